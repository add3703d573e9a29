"""One client's connection: its requests in, their answers out, in order."""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Awaitable, Callable

import structlog
import trio

from gateway.bodies import IteratedBody, RequestBody
from gateway.errors import ApiError, ClientGone
from gateway.limits import ServerLimits
from gateway.request import Response
from gateway.sweeper import Sweeper
from pool.channel import SocketChannel
from pool.contracts.base import BodySource, Headers
from pool.errors import ChannelClosed, ExchangeError
from pool.wire.http1 import BadMessage, RequestMessage, RequestReader, chunk, status_line

log = structlog.get_logger("poold.http")

CLOSING_S = 1.0  # without a request, for a connection of a server that closes
WHOLE_BYTES = 65_536  # a declared body up to this is read before the request is answered
LINGER_S = 2.0  # for what a client sends after it was answered
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Answer = Callable[[RequestMessage, "Connection"], Awaitable[None]]


class Phase(enum.IntEnum):
    """What a connection waits for."""

    IDLE = 0  # a request
    HEAD = 1  # the rest of a head
    BODY = 2  # the rest of a body, or that the client takes its answer
    RUN = 3  # the function


class Connection:
    """Serves requests until the client or a limit ends it. At most one request is answered at a time."""

    __slots__ = (
        "_channel",
        "_closing",
        "_cut",
        "_keep_alive",
        "_limits",
        "_message",
        "_reader",
        "_run_limit",
        "_scope",
        "_seen_activity",
        "_seen_at_s",
        "_seen_phase",
        "_sweeper",
        "activity",
        "answered",
        "client_ip",
        "deadline_s",
        "phase",
        "requests",
        "requests_seen",
        "start_kind",
        "status",
        "trusted",
    )

    def __init__(
        self, channel: SocketChannel, limits: ServerLimits, sweeper: Sweeper, *, client_ip: bytes, trusted: bool
    ) -> None:
        self._channel = channel
        self._limits = limits
        self._sweeper = sweeper
        self._reader = RequestReader(limits.head)
        self._message = RequestMessage()
        self._scope = trio.CancelScope()
        self._cut: ApiError | None = None
        self._closing: Callable[[], bool] = bool  # False until serve() is told whom to ask
        self._keep_alive = True
        self._seen_activity = -1
        self._seen_at_s = 0.0
        self._seen_phase = Phase.IDLE
        self.client_ip = client_ip
        self.trusted = trusted
        self.phase = Phase.IDLE
        self.activity = 0  # goes up whenever the client sends or takes something
        self.requests = 0
        self.requests_seen = -1
        self.status = 0  # of the last answer
        self.start_kind = ""  # of the last invocation
        self.answered = False  # some of the present request's answer was sent
        self.deadline_s = math.inf  # of the present invocation
        self._run_limit = ("", 0.0)

    async def serve(self, answer: Answer, closing: Callable[[], bool]) -> None:
        """Serve until the connection ends. Never raises but by cancellation from outside."""
        sweeper = self._sweeper
        self._closing = closing
        sweeper.add(self)
        try:
            with self._scope:
                await self._serve(answer)
            if self._scope.cancelled_caught and self._cut is not None and not self.answered:
                with trio.move_on_after(1):
                    await self._try_error(self._cut)
        except (ChannelClosed, ClientGone):
            pass
        except Exception:  # a fault in one request must not end the daemon under the others
            log.exception("a request failed unexpectedly", target=self._message.target.decode("ascii", "replace"))
            with contextlib.suppress(ChannelClosed, ClientGone), trio.move_on_after(1):
                await self._try_error(
                    ApiError(500, "internal", "an error inside poold", hint="its log has the details")
                )
        finally:
            sweeper.all.discard(self)
            sweeper.running.discard(self)
            self._channel.close()

    # --- called by the sweeper ---

    def time_is_up(self) -> None:
        """The present invocation has had its time."""
        function, limit_s = self._run_limit
        self._cut = ApiError(
            504,
            "invocation_timeout",
            f"{function} did not answer within {limit_s:g} s and was ended",
            hint="the limit is the key timeout_s of its spec",
        )
        self._scope.cancel()

    def look_for_hang_up(self) -> None:
        """End the present request when its client has gone."""
        if self.phase is Phase.RUN and self._channel.hung_up():
            self._scope.cancel()

    def end_if_idle(self) -> None:
        """The server closes: a connection between requests ends now, unless one is on its way.

        A new one has not brought its first yet: it is given CLOSING_S (see check_client).
        """
        if self.phase is Phase.IDLE and self.requests and not self._channel.unread():
            self._scope.cancel()

    def check_client(self, now_s: float) -> None:
        """End the connection when the client has been silent for too long."""
        if self.activity != self._seen_activity or self.phase is not self._seen_phase:
            head_goes_on = self.phase is Phase.HEAD and self._seen_phase is Phase.HEAD
            self._seen_activity, self._seen_phase = self.activity, self.phase
            if not head_goes_on:  # a head has its time as a whole, however it trickles
                self._seen_at_s = now_s
                return
        limits = self._limits
        silent_s = now_s - self._seen_at_s
        if self.phase is Phase.IDLE and silent_s >= (CLOSING_S if self._closing() else limits.idle_timeout_s):
            self._scope.cancel()
        elif self.phase is Phase.HEAD and silent_s >= limits.head_timeout_s:
            self._cut = ApiError(408, "head_timeout", f"the head did not arrive within {limits.head_timeout_s:g} s")
            self._scope.cancel()
        elif self.phase is Phase.BODY and silent_s >= limits.body_timeout_s:
            self._cut = ApiError(408, "body_timeout", f"no more of the body came for {limits.body_timeout_s:g} s")
            self._scope.cancel()

    # --- requests ---

    async def _serve(self, answer: Answer) -> None:
        running = self._sweeper.running
        began = self._sweeper.began
        allowed = self._limits.allowed_hosts
        while self._keep_alive:
            self.answered = False  # before it is read: what is no request is answered too
            message = await self._next()
            if message is None:
                return
            self.start_kind = ""
            self.requests += 1
            self.phase = Phase.RUN
            began(self)
            try:
                if allowed and not self.trusted and _host_name(message.host) not in allowed:
                    raise ApiError(421, "unknown_host", "this server does not answer for that Host")
                await answer(message, self)
            except ApiError as exc:
                await self._try_error(exc)
            finally:
                running.discard(self)
                self.deadline_s = math.inf
                self.phase = Phase.IDLE
            if not message.done:
                await self._linger()  # an unread body stands before the next request
                return

    async def _next(self) -> RequestMessage | None:
        """The next request, with its body when that is small. None: no more. Answers what is no request."""
        reader = self._reader
        messages = reader.messages
        receive = self._channel.receive
        try:
            while not messages or not messages[0].head_done:
                data = await receive()
                if not data:
                    return None
                self.activity += 1
                reader.feed(data)
                if self.phase is Phase.IDLE:
                    self.phase = Phase.HEAD
            message = self._message = messages.popleft()
            self._keep_alive = message.keep_alive
            if not message.done and message.length is not None and message.length <= WHOLE_BYTES:
                if message.expects_continue and not message.parts:
                    await self._channel.send_all(CONTINUE)
                    message.expects_continue = False
                self.phase = Phase.BODY
                while not message.done:
                    self._channel.hurry()
                    if not await self._feed():
                        return None
        except BadMessage as exc:
            self._keep_alive = False
            await self._try_error(ApiError(exc.status, "bad_request", exc.message))
            await self._linger()
            return None
        if message.parts:
            message.body = message.take_body()
        return message

    async def _linger(self) -> None:
        """Let what is still coming come, for a moment: to close over unread bytes resets the connection, and a client
        that is still sending then never sees its answer."""
        self._channel.end_sending()
        with trio.move_on_after(LINGER_S), contextlib.suppress(ChannelClosed):
            while await self._channel.receive():
                pass

    def rest_of_body(self) -> RequestBody:
        """The present request's body, less what came with its head."""
        return RequestBody(self, self._message, self._limits.max_body_bytes - len(self._message.body))

    async def _feed(self) -> bool:
        """Read once from the client. False at the end of its stream. Raises BadMessage, ChannelClosed."""
        data = await self._channel.receive()
        if not data:
            return False
        self.activity += 1
        self._reader.feed(data)
        return True

    async def read_more(self, message: RequestMessage) -> bytes:
        """The next bytes of a body under way; b"" at its end. Raises ClientGone, ApiError."""
        data = message.take_body()
        if data or message.done:
            return data
        if message.expects_continue:
            message.expects_continue = False
            await self.send(CONTINUE)
        self.phase = Phase.BODY
        try:
            while not data and not message.done:
                self._channel.hurry()
                if not await self._feed():
                    raise ClientGone
                data = message.take_body()
        except BadMessage as exc:
            self._keep_alive = False
            raise ApiError(exc.status, "bad_request", exc.message) from exc
        except ChannelClosed as exc:
            raise ClientGone from exc
        finally:
            self.phase = Phase.RUN  # not what it was: a two-way stream sends at the same time
        return data

    # --- answers ---

    async def send(self, data: bytes | memoryview) -> None:
        """Send bytes of an answer. Raises ClientGone."""
        self.phase = Phase.BODY
        try:
            await self._channel.send_all(data)
        except ChannelClosed as exc:
            raise ClientGone from exc
        self.phase = Phase.RUN
        self.activity += 1

    async def reply(self, status: int, head: bytes, body: bytes) -> None:
        """Send a whole answer in one write. `head`: header lines, without content-length and connection."""
        unsent = self.try_reply(status, head, body)
        if unsent is not None:
            await self.send_rest(unsent)

    async def send_rest(self, unsent: memoryview) -> None:
        """Send what try_reply() left. The run is over: only the client's own pace counts now. Raises ClientGone."""
        self.deadline_s = math.inf
        await self.send(unsent)

    def try_reply(self, status: int, head: bytes, body: bytes) -> memoryview | None:
        """reply(), as far as the client takes it at once; what is left must go to send_rest(). Raises ClientGone."""
        self.answered = True
        self.status = status
        close = b"" if self._keeps() else b"connection: close\r\n"
        if status in (204, 304) or status < 200 or self._message.method == b"HEAD":
            data = b"%b%b%b\r\n" % (status_line(status), head, close)
        else:
            data = b"%b%bcontent-length: %d\r\n%b\r\n%b" % (status_line(status), head, len(body), close, body)
        try:
            sent = self._channel.try_send(data)
        except ChannelClosed as exc:
            raise ClientGone from exc
        self.activity += 1
        return None if sent == len(data) else memoryview(data)[sent:]

    async def reply_stream(self, status: int, head: bytes, length: int | None, first: bytes, rest: BodySource) -> None:
        """Send an answer as it comes, with back-pressure. An answer that breaks off closes the connection."""
        self.answered = True
        self.status = status
        chunked = False
        if length is not None:
            framing = b"content-length: %d\r\n" % length
        elif self._message.version == "1.0":
            self._keep_alive = False
            framing = b""
        else:
            chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        close = b"" if self._keeps() else b"connection: close\r\n"
        begin = b"%b%b%b%b\r\n" % (status_line(status), head, framing, close)
        if self._message.method == b"HEAD":
            await self.send(begin)
            return
        await self.send(begin + (chunk(first) if chunked and first else first))
        try:
            while data := await rest.receive():
                await self.send(chunk(data) if chunked else data)
        except ExchangeError:
            self._keep_alive = False
            raise
        if chunked:
            await self.send(chunk(b""))

    async def respond(self, response: Response) -> None:
        """Send what a route answered."""
        lines = [b"content-type: %b\r\n" % response.content_type] if response.content_type else []
        lines += [b"%b: %b\r\n" % pair for pair in response.headers]
        head = b"".join(lines)
        if isinstance(response.body, bytes):
            if self._message.method == b"HEAD":
                head += b"content-length: %d\r\n" % len(response.body)
            await self.reply(response.status, head, response.body)
        else:
            try:
                await self.reply_stream(response.status, head, None, b"", IteratedBody(response.body))
            finally:
                close = getattr(response.body, "aclose", None)
                if close is not None:
                    with trio.CancelScope(shield=True), trio.move_on_after(1):
                        await close()

    def limit_run(self, function: str, from_s: float, limit_s: float) -> None:
        """The present request runs a function, which may take `limit_s` from `from_s` (trio's clock) on."""
        self._run_limit = (function, limit_s)
        self.deadline_s = from_s + limit_s

    def close_after(self) -> None:
        """End the connection after the present answer."""
        self._keep_alive = False

    def _keeps(self) -> bool:
        if not self._message.done or self._closing():
            self._keep_alive = False
        return self._keep_alive

    async def _try_error(self, error: ApiError) -> None:
        if self.answered:
            self._keep_alive = False
            return
        headers: Headers = []
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        await self.respond(Response(error.status, error.body(), headers=headers))


def _host_name(host: bytes | None) -> bytes:
    """A Host header without its port."""
    name, colon, port = (host or b"").lower().rpartition(b":")
    return name if colon and port.isdigit() else name + colon + port
