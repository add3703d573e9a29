"""What the bare proxy knows of HTTP/1.1: one connection, and the messages parsed from it."""

from __future__ import annotations

import contextlib
import re
import socket
from collections import deque

import httptools
import trio

READ_BYTES = 65_536
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"transfer-encoding", b"expect")
)  # RFC 9110 section 7.6.1; transfer-encoding is written anew, expect is answered here
# In front of the body or in it: a false alarm only costs the longer way.
TAKE_APART = re.compile(
    rb"\n(?:connection|keep-alive|proxy-connection|te|trailer|upgrade|transfer-encoding|expect)[ \t]*:", re.IGNORECASE
).search
CHUNKED = b"transfer-encoding: chunked\r\n"
REASONS = {400: b"Bad Request", 501: b"Not Implemented", 502: b"Bad Gateway"}


class PeerGone(Exception):
    """A connection was closed or reset in the middle of something."""


class ClientGone(Exception):
    """The client's side cannot go on; nothing can be said to it."""


def refusal(status: int, why: str) -> bytes:
    """A whole answer of the proxy's own; the connection closes after it."""
    text = why.encode() + b"\n"
    head = b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n"
    return head % (status, REASONS[status], len(text)) + text


class Message:
    """One request or response on its way through; `body` holds what has arrived and is not sent on yet."""

    # Defaults stand on the class: setting ten attributes for each message is a measurable part of the path.
    method = b""
    url = b""
    reason = b""
    version = "1.1"
    status = 0
    head_done = False
    complete = False
    chunked = False  # as received; a response's is changed to how it will be sent
    sized = False  # it has a Content-Length
    expects = False
    keep_alive = True
    answered = False  # the head of its answer is on its way

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []

    def fields(self) -> bytes:
        """The end-to-end fields as they will be sent; notes what the others say."""
        kept: list[bytes] = []
        for name, value in self.headers:
            lower = name.lower()
            if lower in HOP_BY_HOP:
                if lower == b"transfer-encoding":
                    self.chunked = True
                elif lower == b"expect":
                    self.expects = True
                continue
            if lower == b"content-length":
                self.sized = True
            kept.append(b"%b: %b\r\n" % (name, value))
        return b"".join(kept)

    def take_body(self) -> bytes:
        """What has arrived since the last call, framed as it will be sent, with the end mark when it is all."""
        parts, self.body = self.body, []
        if not self.chunked:
            return b"".join(parts)
        framed = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
        if self.complete:
            framed.append(b"0\r\n\r\n")
        return b"".join(framed)


class Reader:
    """Parses one side of a connection into messages, in order (so pipelined requests wait their turn)."""

    __slots__ = ("messages", "tail")

    def __init__(self) -> None:
        self.messages: deque[Message] = deque()
        self.tail = Message()

    def on_message_begin(self) -> None:
        self.tail = Message()
        self.messages.append(self.tail)

    def on_url(self, url: bytes) -> None:
        self.tail.url += url

    def on_status(self, reason: bytes) -> None:
        self.tail.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self.tail.headers.append((name, value))

    def on_body(self, data: bytes) -> None:
        self.tail.body.append(data)

    def on_message_complete(self) -> None:
        self.tail.complete = True


class RequestReader(Reader):
    """The client's side."""

    __slots__ = ("parser",)

    def __init__(self) -> None:
        super().__init__()
        self.parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)

    def on_headers_complete(self) -> None:
        tail, parser = self.tail, self.parser
        tail.head_done = True
        tail.method = parser.get_method()
        tail.version = parser.get_http_version()
        tail.keep_alive = parser.should_keep_alive()


class ResponseReader(Reader):
    """The upstream's side."""

    __slots__ = ("parser",)

    def __init__(self) -> None:
        super().__init__()
        self.parser: httptools.HttpResponseParser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        tail, parser = self.tail, self.parser
        tail.head_done = True
        tail.status = parser.get_status_code()
        tail.keep_alive = parser.should_keep_alive()


class Crowd:
    """How many clients there are."""

    clients = 0


class Peer:
    """One connection and what was parsed from it.

    `raw` is the last read when that was one whole message and nothing else, of which every byte may go on as it is:
    HTTP/1.1 without hop-by-hop fields, as nearly all are. Such a message is parsed, but not taken apart.
    """

    __slots__ = ("crowd", "raw", "reader", "recv", "send", "sock", "used")

    def __init__(self, sock: socket.socket, crowd: Crowd, reader: RequestReader | ResponseReader) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.crowd = crowd
        self.recv = sock.recv
        self.send = sock.send
        self.reader: RequestReader | ResponseReader = reader
        self.used = False
        self.raw = b""

    async def write(self, data: bytes) -> None:
        """Send all; without a checkpoint when the kernel takes it at once. Raises PeerGone."""
        try:
            sent = self.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as exc:
            raise PeerGone(str(exc)) from exc
        while sent < len(data):
            await trio.lowlevel.wait_writable(self.sock)
            try:
                sent += self.send(memoryview(data)[sent:])
            except BlockingIOError:
                continue
            except OSError as exc:
                raise PeerGone(str(exc)) from exc

    async def read(self) -> bool:
        """Wait for bytes and parse them. False at the end of the stream. Raises PeerGone, HttpParserError."""
        crowded = self.crowd.clients > 1
        while True:
            # Among many the bytes are mostly there once the others had their turn, which costs less than asking the
            # kernel; alone they never are.
            if crowded:
                crowded = False
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(self.sock)
            try:
                data = self.recv(READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise PeerGone(str(exc)) from exc
            if not data:
                self.raw = b""
                return False
            reader = self.reader
            begins = not reader.messages
            reader.parser.feed_data(data)
            whole = begins and len(reader.messages) == 1 and reader.tail.complete
            self.raw = data if whole and reader.tail.version == "1.1" and not TAKE_APART(data) else b""
            return True

    def close(self) -> None:
        trio.lowlevel.notify_closing(self.sock)
        with contextlib.suppress(OSError):
            self.sock.close()
