"""An invocation's hold on a slot."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import outcome
import trio

from pool.contracts.base import Call, Reply
from pool.errors import BackendUnavailable, BadAnswer, ExchangeError
from pool.instance import Instance
from scheduler.messages import Abandoned, Grant, Invoked, Reject, Released
from scheduler.model import StartKind

if TYPE_CHECKING:
    from pool.dispatcher import Dispatcher

END_TOLD_S, END_POLL_S = 0.2, 0.005  # how long the backend may take to tell of an instance's end


class Lease:
    """`async with dispatcher.lease(...) as lease: reply = await lease.exchange(call)`.

    Entering waits for a slot: raises Rejected, or ExchangeError(sent=False) when the instance could not be thawed.
    Cancelled while waiting, it gives its place in the queue up. Leaving gives the slot back; the instance is not
    used again when the exchange failed, was cut short, or its answer was not read to the end (call `finished()`).

    A lease must be left by the task that entered it. Between request and grant on a warm instance there is no
    checkpoint.
    """

    __slots__ = (
        "_dispatcher",
        "_granted",
        "_in_exchange",
        "_patience_s",
        "_revision",
        "_task",
        "_thaw_wanted",
        "_unhealthy",
        "_used",
        "asked_s",
        "granted_s",
        "instance",
        "number",
        "run_from_s",
        "start_kind",
        "thaw_s",
    )

    def __init__(self, dispatcher: Dispatcher, revision: str, number: int, patience_s: float) -> None:
        self._dispatcher = dispatcher
        self._revision = revision
        self._patience_s = patience_s
        self.number = number
        self._task: trio.lowlevel.Task | None = None
        self._in_exchange = False
        self._unhealthy = False
        self._used = False
        self._granted = self._thaw_wanted = False
        self.asked_s = 0.0
        self.granted_s = 0.0
        self.run_from_s = 0.0
        self.thaw_s = 0.0
        self.start_kind = StartKind.WARM
        self.instance: Instance = None  # type: ignore[assignment] # None only until the slot is held

    async def __aenter__(self) -> Lease:
        if not self.begin(trio.current_time()):
            await self.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(trio.current_time())

    def begin(self, now_s: float) -> bool:
        """Ask for the slot. True: it is held, and end() must follow; False: wait() must.

        With wait() and end() this is what `async with` does, for the invocation path, where a coroutine more counts.
        Raises Rejected, StartError.
        """
        dispatcher = self._dispatcher
        self.asked_s = now_s
        answer = dispatcher.ask(Invoked(self.number, self._revision, now_s + self._patience_s), now_s)
        if answer is None:
            return False
        return self._take(answer, now_s)

    async def wait(self) -> None:
        """Wait for the slot that begin() did not get, or for its instance to thaw.

        Afterwards the slot is held, and end() must follow. Raises Rejected, StartError, ExchangeError(sent=False):
        then, and when cancelled, nothing is held.
        """
        if not self._granted:
            self._take(await self._wait_for_answer(), trio.current_time())
        instance = self.instance
        if self._thaw_wanted or instance.resting:  # another lease's thaw may be under way
            await self._thaw(instance)

    def end(self, now_s: float) -> None:
        """Give the slot back."""
        healthy = not (self._unhealthy or self._in_exchange)
        self._dispatcher.feed(Released(self.number, healthy, self._used), now_s)

    def _take(self, answer: Grant | Reject, now_s: float) -> bool:
        """The core has decided. True when the instance can be used at once."""
        dispatcher = self._dispatcher
        if type(answer) is Reject:
            raise dispatcher.rejection(answer, self._revision)
        assert isinstance(answer, Grant)
        self._granted = True
        self.granted_s = self.run_from_s = now_s
        self.start_kind = answer.start_kind
        instance = self.instance = dispatcher.instance(answer.instance)
        self._thaw_wanted = answer.thaw
        return not (answer.thaw or instance.resting)

    async def exchange(self, call: Call) -> Reply:
        """Carry out the invocation. A reply with a stream leaves the lease open: read it, then finished().

        Raises ExchangeError, BadAnswer.
        """
        instance = self.instance
        self._in_exchange = self._used = True
        instance.log.enter(call.id)
        try:
            reply = await instance.session.exchange(call)
        except ExchangeError as exc:
            if not exc.sent:
                self._used = False
            elif not isinstance(exc, BadAnswer):
                await self._say_how_it_ended(exc)
            raise
        finally:
            instance.log.leave(call.id)
        if reply.stream is None:
            self._in_exchange = False
        return reply

    async def _say_how_it_ended(self, error: ExchangeError) -> None:
        """A connection that broke is mostly the code's end, which the backend tells a moment later."""
        running = self.instance.running
        with trio.move_on_after(END_TOLD_S):
            while running.exited is None:  # noqa: ASYNC110 # too rare to ask every backend for an event
                await trio.sleep(END_POLL_S)
        if running.exited is not None:
            error.message = f"{error.message}; it ended: {running.exited}"

    def finished(self) -> None:
        """The reply's stream was read to its end."""
        self._in_exchange = False

    def stages(self) -> list[tuple[str, float]]:
        """What the time before the exchange went into: (stage, seconds), in order, those that took part."""
        waited_s = self.granted_s - self.asked_s
        if self.start_kind is not StartKind.COLD:
            stages = [("queue", waited_s)]
        else:
            parts = self.instance.stages
            stages = [("queue", max(0.0, waited_s - sum(parts.values()))), *parts.items()]
        if self.thaw_s:
            stages.append(("thaw", self.thaw_s))
        return stages

    async def _wait_for_answer(self) -> Grant | Reject:
        dispatcher = self._dispatcher
        self._task = trio.lowlevel.current_task()
        dispatcher.waiting[self.number] = self

        def abort(_: object) -> trio.lowlevel.Abort:
            del dispatcher.waiting[self.number]
            dispatcher.feed(Abandoned(self.number), trio.current_time())
            return trio.lowlevel.Abort.SUCCEEDED

        answer: Grant | Reject = await trio.lowlevel.wait_task_rescheduled(abort)
        return answer

    def wake(self, answer: Grant | Reject) -> None:
        """The core has decided (called by the dispatcher, which has taken it out of `waiting`)."""
        assert self._task is not None
        trio.lowlevel.reschedule(self._task, outcome.Value(answer))

    async def _thaw(self, instance: Instance) -> None:
        started_s = trio.current_time()
        thawed = False
        try:
            await instance.thaw()
            thawed = True
        except (OSError, BackendUnavailable) as exc:
            raise ExchangeError(f"the instance could not be thawed: {exc}", sent=False) from exc
        finally:
            if not thawed:  # end() is not called when wait() raises
                self._unhealthy = True
                self.end(trio.current_time())
        self.run_from_s = trio.current_time()
        self.thaw_s = self.run_from_s - started_s
        self._dispatcher.thawed(instance.id, self.thaw_s)
