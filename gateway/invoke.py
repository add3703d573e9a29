"""One invocation, from a call to its answer: the lease, the exchange, the retry, the stages, the counters.

Every public face comes through here.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable

import trio

from gateway.connection import Connection
from gateway.errors import ApiError
from gateway.metrics import ERROR, FUNCTION_ERROR, OK, Metrics
from gateway.registry import Function
from pool.contracts.base import Call, Reply
from pool.contracts.registry import CONTRACTS
from pool.dispatcher import Dispatcher
from pool.errors import BadAnswer, CallRefused, ExchangeError, PoolError, Rejected, StartError
from pool.lease import Lease
from pool.wire.http1 import CONNECTION, EXPECT, KINDS, end_to_end, kind_of
from scheduler.model import RejectReason, StartKind

ATTEMPTS = 3  # while nothing was sent
RETRY_BACKEND_S = 5.0  # when the engine may answer again

# The status and the stable code of each refusal. 429: this function has too much to do; 503: poold cannot now.
_REJECTIONS = {
    RejectReason.UNKNOWN_REVISION: (404, "function_not_found"),
    RejectReason.QUEUE_FULL: (429, "queue_full"),
    RejectReason.DEADLINE: (503, "queue_timeout"),
    RejectReason.WOULD_MISS_DEADLINE: (503, "would_miss_deadline"),
    RejectReason.CONCURRENCY_LIMIT: (429, "concurrency_limit"),
    RejectReason.NO_CAPACITY: (503, "no_capacity"),
    RejectReason.START_FAILED: (502, "start_failed"),
    RejectReason.CRASH_LOOP: (503, "crash_loop"),
    RejectReason.BACKEND_DOWN: (503, "backend_down"),
    RejectReason.REMOVED: (404, "function_not_found"),
    RejectReason.DRAINING: (503, "draining"),
}
# The revision went while the invocation was on its way: there may be a newer one.
_REPLACED = frozenset((RejectReason.UNKNOWN_REVISION, RejectReason.REMOVED))


class InvocationIds:
    """Ids in the shape of a UUID, unique over restarts, cheap to make."""

    __slots__ = ("_next", "_prefix")

    def __init__(self) -> None:
        self._prefix = str(uuid.uuid4())[:24]
        self._next = 0

    def new(self) -> str:
        """A new id."""
        self._next += 1
        return f"{self._prefix}{self._next:012x}"


class Invoker:
    """Carries invocations out. One for the daemon."""

    def __init__(self, dispatcher: Dispatcher, metrics: Metrics, lookup: Callable[[str], Function | None]) -> None:
        self._lease = dispatcher.lease
        self._now = trio.lowlevel.current_clock().current_time  # trio.current_time(), less two calls
        self._lookup = lookup
        self._metrics = metrics
        self._ids = InvocationIds()

    def new_id(self) -> str:
        """An id for a new invocation."""
        return self._ids.new()

    async def answer(self, function: Function, call: Call, connection: Connection) -> None:
        """Invoke a function and answer on a connection, streaming what is long.

        Raises ApiError while nothing was answered; ClientGone.
        """
        attempt = 0
        while True:
            attempt += 1
            try:
                CONTRACTS[function.spec.contract].check_call(function.spec, call)
                lease = self._lease(function.revision.id, function.spec.queue.timeout_s)
                if not lease.begin(self._now()):
                    await lease.wait()
                unsent = await self._exchange(function, call, connection, lease)
            except Rejected as exc:
                newer = self._lookup(function.name) if exc.reason in _REPLACED and attempt < ATTEMPTS else None
                if newer is None or newer.revision.id == function.revision.id:
                    self._metrics.of(function.name).reject(str(exc.reason))
                    raise api_error(exc, function.name) from exc
                function = newer
            except ExchangeError as exc:
                if exc.sent or attempt >= ATTEMPTS or call.stream is not None:
                    raise api_error(exc, function.name) from exc
                connection.deadline_s = math.inf  # the next lease may have to wait, which is not the function's time
            except PoolError as exc:
                self._metrics.of(function.name).reject(exc.code)
                raise api_error(exc, function.name) from exc
            else:
                if unsent is not None:  # a slow client holds no instance
                    await connection.send_rest(unsent)
                return

    async def _exchange(
        self, function: Function, call: Call, connection: Connection, lease: Lease
    ) -> memoryview | None:
        """Use the lease, answer, end the lease. Returns what of the answer the client has not taken yet.

        The answer goes first: no task runs between it and the slot's return, and the client has it sooner.
        """
        outcome = ERROR
        now_s = 0.0
        try:
            connection.start_kind = lease.start_kind
            connection.limit_run(function.name, lease.run_from_s, function.spec.timeout_s)
            reply = await lease.exchange(call)
            now_s = self._now()
            head = reply_head(reply, lease, call, now_s)
            unsent = None
            if reply.stream is None:
                unsent = connection.try_reply(reply.status, head, reply.body)
            else:
                await connection.reply_stream(reply.status, head, reply.length, reply.body, reply.stream)
                lease.finished()
                now_s = self._now()
            outcome = OK if reply.function_error is None else FUNCTION_ERROR
        finally:
            if outcome is ERROR:
                now_s = self._now()
            lease.end(now_s)
            self._metrics.of(function.name).observe(lease.start_kind, outcome, now_s - lease.asked_s)
        return unsent


def reply_head(reply: Reply, lease: Lease, call: Call, now_s: float) -> bytes:
    """The answer's header lines: the function's, then how it was started and what its time went into (in ms)."""
    lines = []
    named = False
    for pair in reply.headers:
        kind = KINDS.get(pair[0])
        if kind is None:
            kind = kind_of(pair[0])
        if kind <= EXPECT:
            lines.append(b"%b: %b\r\n" % pair)
        elif kind == CONNECTION and pair[1].lower() not in (b"keep-alive", b"close"):
            named = True
    if named:  # it may name headers that concern only the connection to the instance
        lines = [b"%b: %b\r\n" % pair for pair in end_to_end(reply.headers) if kind_of(pair[0]) <= EXPECT]
    if reply.length is not None and call.method == b"HEAD":
        lines.append(b"content-length: %d\r\n" % reply.length)
    if lease.start_kind is StartKind.WARM:  # by far the most frequent
        lines.append(
            b"x-poold-start: warm\r\nx-poold-invocation: %b\r\nserver-timing: queue;dur=%.3f, run;dur=%.3f\r\n"
            % (call.id.encode(), (lease.granted_s - lease.asked_s) * 1000, (now_s - lease.run_from_s) * 1000)
        )
    else:
        stages = [*lease.stages(), ("run", now_s - lease.run_from_s)]
        lines.append(
            b"x-poold-start: %b\r\nx-poold-invocation: %b\r\nserver-timing: %b\r\n"
            % (
                lease.start_kind.encode(),
                call.id.encode(),
                ", ".join([f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in stages]).encode(),
            )
        )
    if reply.function_error is not None:
        lines.append(b"x-poold-function-error: %b\r\n" % _header_text(reply.function_error))
    return b"".join(lines)


def api_error(error: PoolError, function: str) -> ApiError:
    """The answer for what went wrong with an invocation of `function`."""
    if isinstance(error, Rejected):
        status, code = _REJECTIONS[error.reason]
        return ApiError(
            status, code, f"{function}: {error.message}", hint=error.hint, retry_after_s=error.retry_after_s
        )
    if isinstance(error, StartError):
        status = 503 if error.backend_fault else 502
        retry_s = RETRY_BACKEND_S if error.backend_fault else None
        answer = ApiError(status, error.code, error.message, hint=error.hint, retry_after_s=retry_s)
        if error.log_tail:
            answer.details = [{"log_tail": error.log_tail}]
        return answer
    if isinstance(error, CallRefused):
        return ApiError(error.status, error.code, f"{function}: {error.message}", hint=error.hint)
    if isinstance(error, BadAnswer):
        return ApiError(502, error.code, f"{function}: {error.message}", hint=error.hint)
    if isinstance(error, ExchangeError):
        hint = error.hint or f"see what it printed: poolctl logs {function}"
        return ApiError(502, error.code, f"{function}: the instance failed: {error.message}", hint=hint)
    message = f"{function}: {error.message}"
    return ApiError(503, error.code, message, hint=error.hint, retry_after_s=RETRY_BACKEND_S)


def _header_text(text: str) -> bytes:
    return " ".join(text.split()).encode("ascii", "replace")[:200]
