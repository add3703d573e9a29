"""A deployment that a client follows: progress lines as they come, the result or the error at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import structlog
import trio

from gateway.apis.faults import pool_fault
from gateway.apis.views import Deployed, Finished, Progress
from gateway.errors import ApiError
from pool.errors import PoolError

log = structlog.get_logger("poold.deploy")

PROGRESS_LINES = 256  # a client further behind misses lines; never the last

Work = Callable[[Callable[[str], None]], Awaitable[Deployed]]


class Course(AsyncIterator[bytes]):
    """ndjson: {"progress": "..."} lines, then one {"result": {...}} or {"error": {...}}.

    The work runs in a nursery that outlives the answer, so that no scope of the answer's has to enclose it;
    closing the iterator (the client went away) cancels it.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._scope = trio.CancelScope()
        self._send, self._receive = trio.open_memory_channel[str](PROGRESS_LINES)
        self._last: bytes | None = None

    async def run(self) -> None:
        """Do the work. Runs once, in the nursery; lets no error but cancellation out."""
        with self._send:
            try:
                with self._scope:
                    self._last = _line(Finished(await self._work(self._say)))
            except ApiError as exc:
                self._last = exc.body()
            except PoolError as exc:
                self._last = pool_fault(exc).body()
            except Exception:
                log.exception("a deployment failed unexpectedly")
                self._last = ApiError(500, "internal", "an error inside poold", hint="see its log").body()
            if self._last is None:
                self._last = ApiError(503, "cancelled", "the deployment was given up: poold is going down").body()

    def _say(self, text: str) -> None:
        try:
            self._send.send_nowait(text)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return

    async def __anext__(self) -> bytes:
        """The next line."""
        try:
            return _line(Progress(await self._receive.receive()))
        except trio.EndOfChannel:
            last, self._last = self._last, None
            if last is None:
                raise StopAsyncIteration from None
            return last

    async def aclose(self) -> None:
        """Give the work up, if it still runs."""
        self._scope.cancel()
        self._receive.close()
        await trio.lowlevel.checkpoint()


def _line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"
