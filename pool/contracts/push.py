"""What contracts share in which the code listens on a port: dialling, waiting until it listens, the exchange."""

from __future__ import annotations

import trio

from pool.connection import IDLE_CHECK_S, Http1Connection, NoAnswer
from pool.contracts.base import BodySource, Call, Headers, Link, Reply
from pool.errors import BackendUnavailable, ChannelClosed, ExchangeError, PoolError, StartError
from pool.wire.http1 import ResponseReader, chunk

POLL_FIRST_S = 0.001
POLL_MOST_S = 0.02
SHORT_BYTES = 65_536  # of a body that nobody wants: worth reading to keep the connection
SAFE_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS"))  # may be sent twice, RFC 9110 section 9.2.1


class LeasedBody:
    """The rest of an answer; gives its connection back at the end, and closes it when the answer breaks off."""

    __slots__ = ("_connection", "_session")

    def __init__(self, session: PushSession, connection: Http1Connection) -> None:
        self._session = session
        self._connection = connection

    async def receive(self) -> bytes:
        """See BodySource.receive."""
        try:
            data = await self._connection.receive()
        except PoolError:
            self._session.drop(self._connection)
            raise
        if not data:
            self._session.give_back(self._connection)
        return data


class PushSession:
    """Keeps up to `spec.concurrency` connections to one instance, most recently used first.

    Subclasses say how a call becomes a request and what an answer means.
    """

    __slots__ = ("_busy", "_idle", "_now", "link", "open_")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.open_ = True
        self._idle: list[Http1Connection] = []
        self._busy: set[Http1Connection] = set()
        self._now = trio.lowlevel.current_clock().current_time  # trio.current_time(), less two calls

    # --- what subclasses give ---

    def render(self, call: Call) -> bytes:
        """The request's head, ending in an empty line, without body."""
        raise AssertionError("a subclass renders")

    def interpret(self, call: Call, reader: ResponseReader) -> Reply:
        """What the answer means; its body is filled in afterwards, unless the contract answers in its place."""
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
        if not self.link.adopted:
            await self.initialise()
        self.link.stages["init"] = trio.current_time() - connected_s

    async def exchange(self, call: Call) -> Reply:
        """See Session.exchange."""
        head = self.render(call)
        stream = call.stream
        if call.body:
            head += chunk(call.body) if stream is not None and call.length is None else call.body
        reader, connection = await self.ask(head, stream, call.length is None, call.method)
        try:
            reply = self.interpret(call, reader)
        except PoolError:
            self.drop(connection)
            raise
        if reply.body:
            self.give_back(connection) if reader.done else self.drop(connection)
            return reply
        reply.body = reader.take_body()
        if reader.done:
            self.give_back(connection)
        else:
            reply.stream = LeasedBody(self, connection)
        return reply

    async def ask(
        self, request: bytes, stream: BodySource | None = None, chunked: bool = False, method: bytes = b"POST"
    ) -> tuple[ResponseReader, Http1Connection]:
        """Send a request on a free connection. The connection must go to give_back() or drop() afterwards.

        Servers close connections that rest, perhaps just now: a request that may be sent twice then is.
        """
        rested = connection = self._take_idle()
        if connection is None:
            connection = await self._dial()
        done = False
        self._busy.add(connection)
        try:
            reader = await connection.exchange(request, stream, chunked=chunked, head_only=method == b"HEAD")
            done = True
        except NoAnswer as exc:
            if rested is None or method not in SAFE_METHODS or stream is not None or not self.open_:
                raise
            lost = exc
        finally:
            if not done:
                self.drop(connection)
        if done:
            return reader, connection
        return await self._ask_again(request, method, lost)

    async def _ask_again(self, request: bytes, method: bytes, lost: NoAnswer) -> tuple[ResponseReader, Http1Connection]:
        try:
            connection = await self._dial()
        except ExchangeError:
            raise lost from None  # it did not close a connection, it died
        done = False
        self._busy.add(connection)
        try:
            reader = await connection.exchange(request, None, head_only=method == b"HEAD")
            done = True
        finally:
            if not done:
                self.drop(connection)
        return reader, connection

    async def ask_shortly(self, request: bytes, method: bytes) -> ResponseReader:
        """Send a request whose answer's body is of no interest (a probe, a hook). Raises ExchangeError, BadAnswer."""
        reader, connection = await self.ask(request, method=method)
        try:
            unread = SHORT_BYTES
            while not reader.done and unread > 0:
                unread -= len(await connection.receive())
        finally:
            if reader.done:
                self.give_back(connection)
            else:
                self.drop(connection)
        return reader

    async def after_freeze(self) -> None:
        """The code is frozen: replace the connections by one that it has not seen yet. See Session.after_freeze."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        try:
            fresh = Http1Connection(await self.link.running.dial(self.link.port))
        except (ChannelClosed, BackendUnavailable):
            return  # the next exchange dials
        self.give_back(fresh)

    def give_back(self, connection: Http1Connection) -> None:
        """The connection's answer is done: keep it for the next exchange, or close it."""
        self._busy.discard(connection)
        if connection.reusable and self.open_ and len(self._idle) < self.link.revision.spec.concurrency:
            connection.last_used_s = self._now()
            self._idle.append(connection)
        else:
            connection.close()

    def drop(self, connection: Http1Connection) -> None:
        """The connection cannot be used again."""
        self._busy.discard(connection)
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
            if self._now() - connection.last_used_s < IDLE_CHECK_S or not connection.gone():
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
