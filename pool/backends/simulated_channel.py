"""The inside of a simulated instance: a channel that answers HTTP/1.1 by itself, in the clock's own time.

Nothing runs: what a request leads to is worked out when its last byte arrives, as pieces with the time each is due;
receive() waits for the next one, and for a thaw. A request may ask for what shall happen, in headers:

    x-sim-status: 503       the status
    x-sim-delay-s: 0.5      how long the answer takes (else the backend's draw)
    x-sim-chunks: 3         the body in so many chunks, a delay before each
    x-sim-close: 1          the stream ends in the middle of the answer
    x-sim-garbage: 1        an answer that is not HTTP
    x-sim-silent: 1         no answer, ever
    x-sim-die: 1            the instance dies in mid-request
    x-sim-print: text       a line on its stdout
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import httptools
import trio

from pool.errors import ChannelClosed

GARBAGE = b"\x16\x03\x01 this is no answer\r\n\r\n"
_TRUE = (b"1", b"true", b"yes")


@dataclass(slots=True)
class Request:
    """One request as the instance reads it."""

    method: bytes = b""
    target: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)  # names in lower case
    body: bytearray = field(default_factory=bytearray)
    keep_alive: bool = True

    def asks(self, name: bytes) -> bool:
        """Whether the header x-sim-`name` is set to a yes."""
        return self.headers.get(b"x-sim-" + name, b"").lower() in _TRUE


class Inside(Protocol):
    """What a channel needs of its instance."""

    @property
    def frozen(self) -> bool: ...

    @property
    def exited(self) -> str | None: ...

    @property
    def now_s(self) -> float:
        """Its own clock, which stands still while it is frozen."""

    def begun(self) -> None:
        """A request's first bytes have come."""

    def finished(self, *, answered: bool) -> None:
        """A request is over: answered whole, or cut off."""

    def delay_s(self, request: Request) -> float | None:
        """How long the answer takes; None: it never comes. May change what the request asks for (faults)."""

    def print_line(self, text: bytes) -> None: ...

    def die_in_request(self, delay_s: float) -> None:
        """Die after so long, but not while frozen."""

    def forget(self, channel: SimulatedChannel) -> None: ...


class SimulatedChannel:
    """See pool.channel.Channel."""

    def __init__(self, inside: Inside) -> None:
        self._inside = inside
        self._parser = httptools.HttpRequestParser(self)
        self._request = Request()
        self._pieces: deque[tuple[float, bytes | None]] = deque()  # (due, data); None: the stream ends
        self._open_requests = 0
        self._closed = False
        self._ended = False  # the instance has closed its side
        self._changed = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See Channel.send_all."""
        self.try_send(bytes(data))

    def try_send(self, data: bytes) -> int:
        """See Channel.try_send. Like a socket's buffer it takes bytes for a frozen instance too."""
        if self._closed or self._ended or self._inside.exited is not None:
            raise ChannelClosed("the simulated instance has closed the connection")
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._add(self._inside.now_s, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            self._add(self._inside.now_s, None)
        return len(data)

    def hurry(self) -> None:
        """See Channel.hurry. Nothing is held back here."""

    async def receive(self) -> bytes:
        """See Channel.receive."""
        while True:
            if self._closed:
                raise ChannelClosed("closed")
            if self._inside.exited is not None:
                self._ended = True
                raise ChannelClosed("reset: the simulated instance has died")
            if self._ended:
                await trio.lowlevel.checkpoint()
                return b""
            due = self._due()
            if due <= trio.current_time():
                await trio.lowlevel.checkpoint()
                if self._due() > trio.current_time() or self._inside.exited is not None:
                    continue  # frozen, closed or dead meanwhile
                data = self._take()
                if data is not None:
                    return data
                continue
            with trio.move_on_at(due):
                await self._changed.wait()

    def peer_gone(self) -> bool:
        """See Channel.peer_gone."""
        at_end = bool(self._pieces) and self._due() <= trio.current_time()
        return self._closed or self._ended or at_end or self._inside.exited is not None

    def close(self) -> None:
        """See Channel.close."""
        if not self._closed:
            self._closed = True
            self._cut()
            self._inside.forget(self)
            self.wake()

    def wake(self) -> None:
        """Something about the instance has changed."""
        self._changed.set()
        self._changed = trio.Event()

    def postpone(self, seconds: float) -> None:
        """The instance stood still for so long."""
        self._pieces = deque((due + seconds, data) for due, data in self._pieces)
        self.wake()

    def _due(self) -> float:
        if self._inside.frozen or not self._pieces:
            return float("inf")
        return self._pieces[0][0]

    def _take(self) -> bytes | None:
        """The next piece; None when it was a mark. The end of the stream sets _ended."""
        _, data = self._pieces.popleft()
        if data is None:
            self._ended = True
            self._cut()
        elif data == b"":  # the mark after a whole answer
            self._open_requests -= 1
            self._inside.finished(answered=True)
        if self._pieces and self._pieces[0][1] == b"" and data:
            self._take()  # with its last byte an answer is over, so the slot is free when the reader sees it
        return data or None

    def _cut(self) -> None:
        for _ in range(self._open_requests):
            self._inside.finished(answered=False)
        self._open_requests = 0
        self._pieces.clear()

    def _add(self, due: float, data: bytes | None) -> None:
        self._pieces.append((due, data))
        self.wake()

    # What httptools calls, in this order.
    def on_message_begin(self) -> None:
        self._request = Request()
        self._open_requests += 1
        self._inside.begun()

    def on_url(self, url: bytes) -> None:
        self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._request.body += body

    def on_message_complete(self) -> None:
        request = self._request
        request.method = self._parser.get_method()
        request.keep_alive = self._parser.should_keep_alive()
        self._answer(request)

    def _answer(self, request: Request) -> None:
        if text := request.headers.get(b"x-sim-print"):
            self._inside.print_line(text)
        delay_s = self._inside.delay_s(request)
        last_due = self._pieces[-1][0] if self._pieces else 0.0
        due = max(self._inside.now_s, last_due)
        if request.asks(b"die"):
            self._inside.die_in_request(delay_s or 0.0)
            return
        if delay_s is None or request.asks(b"silent"):
            return
        if request.asks(b"garbage"):
            self._add(due + delay_s, GARBAGE)
            return
        pieces = _answer_pieces(request)
        if request.asks(b"close"):
            whole = b"".join(pieces)
            self._add(due + delay_s, whole[: max(1, len(whole) - 1)])
            self._add(due + delay_s, None)
            return
        for piece in pieces:
            due += delay_s
            self._add(due, piece)
        self._add(due, b"")
        if not request.keep_alive:
            self._add(due, None)


def _answer_pieces(request: Request) -> list[bytes]:
    body = b"" if request.method == b"HEAD" else bytes(request.body)
    status = int(request.headers.get(b"x-sim-status", b"200"))
    kind = request.headers.get(b"content-type", b"application/octet-stream")
    head = b"HTTP/1.1 %d Simulated\r\nContent-Type: %s\r\n" % (status, kind)
    if not request.keep_alive:
        head += b"Connection: close\r\n"
    count = int(request.headers.get(b"x-sim-chunks", b"0"))
    if count <= 0:
        return [head + b"Content-Length: %d\r\n\r\n" % len(body) + body]
    size = max(1, -(-len(body) // count))
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
    return [head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"]
