"""The body of a request at which the parser has stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httptools

if TYPE_CHECKING:
    from pool.wire.http1 import RequestMessage


def body_parser(message: RequestMessage, begun: bytes) -> httptools.HttpRequestParser | None:
    """For a request that asks for another protocol: what reads its body on, `begun` read already. None: it has none.

    At such a request llhttp stops and leaves the body to whoever speaks that protocol. Here nobody does: the request
    is answered as if it had not asked (RFC 9110 section 7.8), so its body counts. Java's client asks on each POST.
    Raises HttpParserError.
    """
    if message.method == b"CONNECT" or not (message.length or message.chunked):
        return None
    message.done = False
    parser = httptools.HttpRequestParser(_Body(message))
    framing = b"transfer-encoding: chunked" if message.chunked else b"content-length: %d" % (message.length or 0)
    parser.feed_data(b"POST / HTTP/1.1\r\nhost: h\r\n%b\r\n\r\n" % framing)
    parser.feed_data(begun)
    return parser


class _Body:
    """Called by httptools."""

    __slots__ = ("_message",)

    def __init__(self, message: RequestMessage) -> None:
        self._message = message

    def on_body(self, data: bytes) -> None:
        if not self._message.done:
            self._message.parts.append(data)

    def on_message_complete(self) -> None:
        self._message.done = True
