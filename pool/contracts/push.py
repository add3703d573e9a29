"""What contracts share in which the code listens on a port: dialling, waiting until it listens, the exchange."""

from __future__ import annotations

import trio

from pool.connection import IDLE_CHECK_S, Http1Connection
from pool.contracts.base import BodySource, Call, Headers, Link, Reply
from pool.errors import ChannelClosed, ExchangeError, StartError
from pool.wire.http1 import ResponseReader

POLL_FIRST_S = 0.001
POLL_MOST_S = 0.02


class LeasedBody:
    """The rest of an answer; gives its connection back at the end."""

    __slots__ = ("_connection", "_session")

    def __init__(self, session: PushSession, connection: Http1Connection) -> None:
        self._session = session
        self._connection = connection

    async def receive(self) -> bytes:
        """See BodySource.receive."""
        done = False
        try:
            data = await self._connection.receive()
            done = not data
        finally:
            if done:
                self._session.give_back(self._connection)
            elif not self._session.open_:
                self._connection.close()
        return data


class PushSession:
    """Keeps up to `spec.concurrency` connections to one instance, most recently used first.

    Subclasses say how a call becomes a request and what an answer means.
    """

    __slots__ = ("_busy", "_idle", "link", "open_")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.open_ = True
        self._idle: list[Http1Connection] = []
        self._busy: set[Http1Connection] = set()

    # --- what subclasses give ---

    def render(self, call: Call) -> bytes:
        """The request's head, ending in an empty line, without body."""
        raise AssertionError("a subclass renders")

    def interpret(self, call: Call, reader: ResponseReader) -> Reply:
        """What the answer means; its body is filled in afterwards."""
        raise AssertionError("a subclass interprets")

    async def initialise(self) -> None:
        """Runs once, when the code listens."""

    async def before_freeze(self) -> None:
        """No hook by default."""

    async def before_stop(self) -> None:
        """No hook by default."""

    # --- the session ---

    async def prepare(self) -> None:
        """Wait until the code listens, connect, initialise. See Session.prepare."""
        started_s = trio.current_time()
        connection = await self._wait_until_listening()
        self.give_back(connection)
        connected_s = trio.current_time()
        self.link.stages["connect"] = connected_s - started_s
        await self.initialise()
        self.link.stages["init"] = trio.current_time() - connected_s

    async def exchange(self, call: Call) -> Reply:
        """See Session.exchange."""
        head = self.render(call)
        stream = call.stream
        reader, connection = await self.ask(
            head + call.body if call.body else head,
            stream,
            chunked=stream is not None and call.length is None,
            head_only=call.method == b"HEAD",
        )
        reply = self.interpret(call, reader)
        reply.body = reader.take_body()
        if reader.done:
            self.give_back(connection)
        else:
            reply.stream = LeasedBody(self, connection)
        return reply

    async def ask(
        self, request: bytes, stream: BodySource | None = None, *, chunked: bool = False, head_only: bool = False
    ) -> tuple[ResponseReader, Http1Connection]:
        """Send a request on a free connection. The connection must go to give_back() when the answer is done."""
        connection = self._take_idle() or await self._dial()
        done = False
        self._busy.add(connection)
        try:
            reader = await connection.exchange(request, stream, chunked=chunked, head_only=head_only)
            done = True
        finally:
            if not done:
                self._busy.discard(connection)
                connection.close()
        return reader, connection

    def give_back(self, connection: Http1Connection) -> None:
        """The connection's answer is done: keep it for the next exchange, or close it."""
        self._busy.discard(connection)
        if connection.reusable and self.open_ and len(self._idle) < self.link.revision.spec.concurrency:
            connection.last_used_s = trio.current_time()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close every connection now, those in use too."""
        self.open_ = False
        for connection in [*self._idle, *self._busy]:
            connection.close()
        self._idle.clear()
        self._busy.clear()

    def _take_idle(self) -> Http1Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if trio.current_time() - connection.last_used_s < IDLE_CHECK_S or not connection.gone():
                return connection
            connection.close()  # servers close what rests too long; that is no failure
        return None

    async def _dial(self) -> Http1Connection:
        try:
            return Http1Connection(await self.link.running.dial(self.link.port))
        except ChannelClosed as exc:
            raise ExchangeError(
                f"nothing listens on port {self.link.port} of the instance any more ({exc})", sent=False
            ) from exc

    async def _wait_until_listening(self) -> Http1Connection:
        link = self.link
        pause_s = POLL_FIRST_S
        while True:
            if link.running.exited is not None:
                raise StartError(f"the code ended before it listened on port {link.port}: {link.running.exited}")
            try:
                return Http1Connection(await link.running.dial(link.port))
            except ChannelClosed:
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, POLL_MOST_S)


def find_header(headers: Headers, name: bytes) -> bytes | None:
    """The first value of that (lower-case) header."""
    for key, value in headers:
        if len(key) == len(name) and key.lower() == name:
            return value
    return None
