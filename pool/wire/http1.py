"""HTTP/1.1 between bytes and messages, without I/O, with limits.

Parsing is httptools' (llhttp, strict); this file adds limits, message boundaries and the writing side.
"""

from __future__ import annotations

import http
from collections import deque
from dataclasses import dataclass

import httptools

from pool.wire.body import body_parser

Headers = list[tuple[bytes, bytes]]

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)  # RFC 9110 section 7.6.1: meant for one connection only


# What a header's name means here, by the name as it was sent: a look-up costs a third of lower() and a comparison.
PLAIN, HOST, EXPECT, LENGTH, CODING, CONNECTION, HOP, OURS = range(8)
_SPECIAL = {
    b"host": HOST,
    b"expect": EXPECT,
    b"content-length": LENGTH,
    b"transfer-encoding": CODING,
    b"connection": CONNECTION,
    b"x-poold-start": OURS,
    b"x-poold-invocation": OURS,
    b"x-poold-function-error": OURS,
}
_KINDS_KEPT = 1_024
_NAME_BYTES_KEPT = 64
KINDS: dict[bytes, int] = {}  # of the names met so far; ask kind_of() for another


def kind_of(name: bytes) -> int:
    """What a header's name means, whatever its case. PLAIN: passed on as it is."""
    kind = KINDS.get(name)
    if kind is None:
        lower = name.lower()
        kind = _SPECIAL.get(lower, HOP if lower in HOP_BY_HOP else PLAIN)
        if len(name) <= _NAME_BYTES_KEPT:  # clients choose the names
            if len(KINDS) >= _KINDS_KEPT:
                KINDS.clear()
            KINDS[name] = kind
    return kind


class BadMessage(Exception):
    """What arrived is not HTTP/1.1 as we take it. `status` is what a server answers to such a request."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


@dataclass(frozen=True, slots=True)
class Limits:
    """What one message may cost before its body."""

    header_count: int = 100
    header_bytes: int = 32_768  # names and values together
    target_bytes: int = 8_192

    @property
    def head_bytes(self) -> int:
        """What a head may cost while it is still arriving: its lines with their separators."""
        return self.header_bytes + 4 * self.header_count + self.target_bytes + 256


class RequestMessage:
    """A request as far as it has arrived. `parts` is the body so far, to be taken out by the reader's user.

    A plain class whose defaults are the class's own: one is made for each request, and most stay as they are.
    """

    method = b""
    target = b""
    version = "1.1"
    keep_alive = True
    length: int | None = None  # Content-Length; None: none was sent, or chunked
    chunked = False
    expects_continue = False
    upgrade = False
    host: bytes | None = None
    host_count = 0
    body = b""  # what the reader's user took out before it handed the message on
    head_done = False
    done = False

    def __init__(self) -> None:
        self.headers: Headers = []
        self.parts: list[bytes] = []

    def take_body(self) -> bytes:
        """What of the body has arrived since the last call."""
        parts = self.parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return data


class RequestReader:
    """Reads the requests of one connection. Pipelined ones queue up in `messages`, at most what one feed held."""

    __slots__ = ("_bytes", "_head_fed", "_head_limit", "_limits", "_message", "_parser", "error", "messages")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._head_limit = limits.head_bytes
        self._head_fed = 0
        self._parser = httptools.HttpRequestParser(self)
        self._bytes = 0
        self._message = RequestMessage()
        self.messages: deque[RequestMessage] = deque()
        self.error: BadMessage | None = None

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises BadMessage; messages complete before the bad one stay in `messages`."""
        before = self._message
        try:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as exc:
                self._message.upgrade = True  # the server answers as if it had not been asked to, and closes
                self._message.keep_alive = False
                self._parser = body_parser(self._message, data[exc.args[0] :]) or self._parser
        except httptools.HttpParserError as exc:
            self._refuse(f"not a valid HTTP/1.1 request: {exc}")
        message = self._message
        if not message.done and message is before:
            # A header or trailer that never ends shows itself only here: the parser keeps it until it is whole.
            self._head_fed = 0 if message.parts else self._head_fed + len(data)
            if self._head_fed > self._head_limit:
                self._refuse(f"the head or trailer is larger than {self._head_limit} bytes", 431)
        if self.error is not None:
            raise self.error

    def _refuse(self, message: str, status: int = 400) -> None:
        if self.error is None:
            self.error = BadMessage(message, status)
            if self.messages and self.messages[-1] is self._message and not self._message.done:
                self.messages.pop()

    # Called by httptools:

    def on_message_begin(self) -> None:
        self._message = RequestMessage()
        self._bytes = 0
        self._head_fed = 0
        if self.error is None:
            self.messages.append(self._message)

    def on_url(self, url: bytes) -> None:
        message = self._message
        message.target += url
        if len(message.target) > self._limits.target_bytes:
            self._refuse(f"the path and query are longer than {self._limits.target_bytes} bytes", 414)

    def on_header(self, name: bytes, value: bytes) -> None:
        message = self._message
        if message.head_done:
            return  # a trailer: not passed on
        message.headers.append((name, value))
        self._bytes += len(name) + len(value)
        kind = KINDS.get(name)
        if kind is None:
            kind = kind_of(name)
        if kind == PLAIN:
            return
        if kind == HOST:
            message.host = value
            message.host_count += 1
        elif kind == LENGTH:
            if value.isdigit():  # the parser refuses anything else
                message.length = int(value)
        elif kind == CODING:
            message.chunked = True
            if value.lower() != b"chunked":
                self._refuse("the only transfer coding taken is chunked", 501)
        elif kind == EXPECT:
            message.expects_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        message, parser = self._message, self._parser
        message.method = parser.get_method()
        message.version = parser.get_http_version()
        message.keep_alive = parser.should_keep_alive()
        message.head_done = True
        limits = self._limits
        if len(message.headers) > limits.header_count:
            self._refuse(f"more than {limits.header_count} headers", 431)
        elif self._bytes > limits.header_bytes:
            self._refuse(f"the headers are larger than {limits.header_bytes} bytes", 431)
        elif message.host_count != 1 and (message.host_count or message.version != "1.0"):
            self._refuse("exactly one Host header is needed")
        elif message.chunked and message.length is not None:
            self._refuse("both Content-Length and Transfer-Encoding")
        elif message.chunked and message.version == "1.0":
            self._refuse("Transfer-Encoding in HTTP/1.0")

    def on_body(self, data: bytes) -> None:
        self._message.parts.append(data)

    def on_message_complete(self) -> None:
        self._message.done = True


class ResponseReader:
    """Reads the answers of one connection, one at a time; call begin() before each.

    What comes after a complete answer is nobody's: it costs the connection (`keep_alive`), not the answer.
    """

    __slots__ = (
        "_bytes",
        "_framed",
        "_head_fed",
        "_head_limit",
        "_head_only",
        "_limits",
        "_parser",
        "_parser_waits",
        "done",
        "error",
        "head_done",
        "headers",
        "keep_alive",
        "length",
        "parts",
        "status",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._head_limit = limits.head_bytes
        self._parser = httptools.HttpResponseParser(self)
        self._parser_waits = False
        self.keep_alive = True
        self.begin(head_only=False)

    def begin(self, *, head_only: bool) -> None:
        """The next answer is to a new request; `head_only`: to a HEAD, so it has no body whatever it says."""
        if self._parser_waits:
            self._parser_waits = False
            self._parser = httptools.HttpResponseParser(self)
        self._head_only = head_only
        self._bytes = 0
        self._framed = False
        self._head_fed = 0
        self.status = 0
        self.length: int | None = None  # as the head declares it
        self.headers: Headers = []
        self.parts: list[bytes] = []
        self.head_done = False
        self.done = False
        self.error: BadMessage | None = None

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises BadMessage."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.error = BadMessage("an answer that switches protocols, which nobody asked for")
        except httptools.HttpParserError as exc:
            if self.done:
                self.keep_alive = False
            elif self.error is None:
                self.error = BadMessage(f"not a valid HTTP/1.1 answer: {exc}")
        if not self.done:
            # A header or trailer that never ends shows itself only here: the parser keeps it until it is whole.
            self._head_fed = 0 if self.parts else self._head_fed + len(data)
            if self._head_fed > self._head_limit and self.error is None:
                self.error = BadMessage(f"an answer with a head or trailer larger than {self._head_limit} bytes")
        if self.error is not None:
            raise self.error

    def headers_say_short(self) -> bool:
        """True when the head announces a body of known, moderate length, so that waiting for all of it is cheap."""
        return self.length is not None and self.length < 1_000_000

    def end_of_stream(self) -> None:
        """The peer closed. Raises BadMessage unless that ends the answer."""
        if self.done:
            return
        if self.head_done and not self._framed:
            self.done = True
            return
        raise BadMessage("the connection closed in the middle of the answer" if self.status else "no answer")

    def take_body(self) -> bytes:
        """What of the body has arrived since the last call."""
        parts = self.parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return data

    # Called by httptools:

    def on_message_begin(self) -> None:
        if self.done:
            self.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_done:
            return  # a trailer
        self.headers.append((name, value))
        self._bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        if self.done:
            return
        parser = self._parser
        self.status = status = parser.get_status_code()
        if status < 200:
            if status == 101:
                self.error = BadMessage("an answer that switches protocols, which nobody asked for")
            return
        limits = self._limits
        if len(self.headers) > limits.header_count or self._bytes > limits.header_bytes:
            self.error = BadMessage(
                f"an answer with more than {limits.header_count} headers or {limits.header_bytes} bytes of them"
            )
        self.head_done = True
        framed = False
        kinds = KINDS
        for name, value in self.headers:
            kind = kinds.get(name)
            if kind is None:
                kind = kind_of(name)
            if kind == LENGTH:
                framed = True
                if value.isdigit():
                    self.length = int(value)
            elif kind == CODING:
                framed = True
        self._framed = framed
        self.keep_alive = framed and parser.should_keep_alive()
        if self._head_only or status in (204, 304):
            if self._head_only:
                # The parser does not know that this was a HEAD, and waits for the body that is announced.
                self._parser_waits = True
            else:
                self.keep_alive = parser.should_keep_alive()
            self.done = True

    def on_body(self, data: bytes) -> None:
        if self.done:
            self.keep_alive = False
        else:
            self.parts.append(data)

    def on_message_complete(self) -> None:
        if self.done:
            return
        if self.status < 200:
            self.headers = []  # an interim answer: the real one follows
            self._bytes = 0
            self.status = 0
        else:
            self.done = True


STATUS_LINES = {
    code: f"HTTP/1.1 {code} {http.HTTPStatus(code).phrase if code in set(http.HTTPStatus) else 'Status'}\r\n".encode()
    for code in range(100, 600)
}


def status_line(status: int) -> bytes:
    """The first line of an answer, with its newline."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d Status\r\n" % status


def end_to_end(headers: Headers) -> Headers:
    """The headers a proxy passes on: without hop-by-hop ones, and without those Connection names."""
    named: set[bytes] = set()
    for name, value in headers:
        if kind_of(name) == CONNECTION:
            named.update(token.strip().lower() for token in value.split(b","))
    named -= _KEPT
    return [pair for pair in headers if kind_of(pair[0]) not in _DROPPED and pair[0].lower() not in named]


_DROPPED = frozenset((CODING, CONNECTION, HOP))
_KEPT = frozenset((b"keep-alive", b"close", b"", b"host"))  # no header's name, or one that no request goes without


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; of no data, the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b"0\r\n\r\n"
