"""The sole owner of the core: feeds it events, carries out its actions, gives out leases."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import structlog
import trio

from pool.backends.base import Backend, BackendBack, BackendLost, InstanceExited
from pool.contracts.base import Contract
from pool.deployment import Deployment, core_spec
from pool.errors import BackendUnavailable, Rejected, StartError
from pool.execution import Execution
from pool.instance import Instance
from pool.lease import Lease
from pool.logbook import LogBook
from pool.spec import Revision
from scheduler.core import Scheduler
from scheduler.journal import dump
from scheduler.messages import (
    Action,
    Adopted,
    BackendDown,
    BackendUp,
    BreakerReset,
    CancelStart,
    Deployed,
    Died,
    Drained,
    Event,
    Freeze,
    Grant,
    Invoked,
    Recycled,
    Reject,
    Removed,
    Sampled,
    Scaled,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
    Thawed,
    Ticked,
)
from scheduler.model import HostLimits, InstanceState, RejectReason
from scheduler.stats import HostStats, InstanceView, RevisionStats

log = structlog.get_logger("poold.dispatcher")

GOING = frozenset((InstanceState.STOPPING, InstanceState.DEAD))


class Dispatcher:
    """Runs instances of the deployed revisions. `run()` must be running for anything to happen.

    All methods belong to the trio thread. None blocks it.
    """

    def __init__(
        self,
        backend: Backend,
        contracts: Mapping[str, Contract],
        limits: HostLimits,
        *,
        epoch: str,
        seed: int | None = None,
    ) -> None:
        self.backend = backend
        self.core = Scheduler(limits, epoch=epoch, rng=random.Random(seed))
        self.logs = LogBook()
        self.waiting: dict[int, Lease] = {}
        self.backend_problem: str | None = None
        self._contracts = contracts
        self._deployments: dict[str, Deployment] = {}
        self._execution = execution = Execution(backend, self.logs, self._deployments, self._settled)
        self._instances = execution.instances
        self._removed: set[str] = set()
        self._draining = self._cut = False
        self._numbers = 0
        self._running = False
        self._pending: list[Action] = []  # decided before run() has its nursery
        self._tick_at_s = -math.inf  # nothing to wake while the ticker is not asleep
        self._tick_wake = trio.Event()
        self._emptied = trio.Event()
        self._handle = self.core.handle
        self._next_deadline = self.core.next_deadline
        self._perform_by_type: dict[type, Callable[[Any], None]] = {
            Grant: self._answer,
            Reject: self._answer,
            Start: execution.begin_start,
            Stop: execution.begin_stop,
            CancelStart: execution.cancel_start,
            Freeze: execution.begin_freeze,
        }

    # --- running ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry out the core's actions until cancelled. Instances are left as they are then; drain() ends them."""
        async with trio.open_nursery() as nursery:
            self._execution.nursery = nursery
            self._running = True
            nursery.start_soon(self._tick)
            nursery.start_soon(self._watch)
            pending, self._pending = self._pending, []
            for action in pending:
                self._perform(action)
            task_status.started()
            await trio.sleep_forever()

    def feed(self, event: Event, now_s: float | None = None) -> None:
        """Tell the core something and carry out what it decides. `now_s`: the time, where it is known already."""
        for action in self._handle(event, trio.current_time() if now_s is None else now_s):
            self._perform(action)
        if self._next_deadline() < self._tick_at_s:
            self._tick_wake.set()
        if self._draining:
            self._note_emptied()

    def ask(self, event: Invoked, now_s: float) -> Grant | Reject | None:
        """Tell the core of an invocation; its answer, if it comes in the same call."""
        answer: Grant | Reject | None = None
        for action in self._handle(event, now_s):
            if (type(action) is Grant or type(action) is Reject) and action.invocation == event.invocation:
                answer = action
            else:
                self._perform(action)
        if self._next_deadline() < self._tick_at_s:
            self._tick_wake.set()
        return answer

    # --- revisions ---

    def deploy(self, revision: Revision, *, min_instances: int | None = None) -> None:
        """Make a revision known; its floor starts at once.

        Raises InvariantError when it is known already, ConfigurationError for a spec that cannot be.
        """
        spec = revision.spec
        contract = self._contracts[spec.contract]
        # The core first: it may refuse. The starts it decides on begin later, when this is done.
        self.feed(Deployed(core_spec(revision, min_instances)))
        self._deployments[revision.id] = Deployment(revision, contract)

    def remove(self, revision_id: str, replaced_by: str | None = None) -> None:
        """Take no more invocations for a revision; end its instances as they fall idle."""
        self._removed.add(revision_id)
        self.feed(Removed(revision_id, replaced_by))
        self._forget_if_gone(revision_id)

    def scale(self, revision_id: str, min_instances: int | None, max_instances: int | None) -> None:
        """Change floor and ceiling."""
        self.feed(Scaled(revision_id, min_instances, max_instances))

    def recycle(self, revision_id: str) -> None:
        """Replace every instance the revision has now."""
        self.feed(Recycled(revision_id))

    def reset_breaker(self, revision_id: str) -> None:
        """Close a revision's breaker by hand."""
        self.feed(BreakerReset(revision_id))

    async def wait_ready(self, revision_id: str, count: int = 1) -> None:
        """Return when `count` instances of the revision have been prepared since its deploy.

        Raises StartError when a start fails first, KeyError when the revision goes.
        """
        while True:
            deployment = self._deployments[revision_id]
            if deployment.prepared >= count:
                return
            if deployment.last_error is not None:
                raise deployment.last_error
            await deployment.changed.wait()

    def live_instances(self, revision_id: str) -> int:
        """Instances of the revision that can serve, now or when they are started."""
        try:
            counts = self.core.revision_stats(revision_id).instances
        except KeyError:
            return 0
        return sum(count for state, count in counts.items() if state not in GOING)

    def last_error(self, revision_id: str) -> StartError | None:
        """Why the last start of the revision failed, unless one has succeeded since."""
        deployment = self._deployments.get(revision_id)
        return deployment.last_error if deployment is not None else None

    def stats(self, revision_id: str) -> RevisionStats:
        """Counts, queue, breaker and estimates of one revision. Raises KeyError."""
        return self.core.revision_stats(revision_id)

    def host_stats(self) -> HostStats:
        """Memory, concurrency and starts of the host."""
        return self.core.host_stats()

    def instances(self, revision_id: str | None = None) -> list[InstanceView]:
        """Every live instance, or one revision's."""
        return self.core.instances(revision_id)

    def instance(self, instance_id: str) -> Instance:
        """A prepared instance. Raises KeyError."""
        return self._instances[instance_id]

    def find_instance(self, instance_id: str) -> Instance | None:
        """A prepared instance, if it is one."""
        return self._instances.get(instance_id)

    async def journal(self) -> bytes:
        """The last events, enough to replay them (scheduler.journal.replay). Encoded in a thread: it takes a while."""
        return await trio.to_thread.run_sync(dump, self.core, self.core.journal.window())

    async def sample(self) -> dict[str, float]:
        """Measure the memory of every instance: MB by instance. The core learns it too (recycling by memory)."""
        found: dict[str, float] = {}
        for instance in list(self._instances.values()):
            await trio.lowlevel.checkpoint()  # others' turn: a sample is often a read without a wait
            try:
                usage = await instance.running.sample()
            except (OSError, BackendUnavailable):
                continue  # it went meanwhile
            except Exception:  # one instance's fault must not end the daemon
                log.exception("an instance could not be measured", instance=instance.id)
                continue
            if instance.id in self._instances:
                found[instance.id] = usage.memory_mb
                self.feed(Sampled(instance.id, usage.memory_mb))
        return found

    # --- leases ---

    def lease(self, revision_id: str, patience_s: float) -> Lease:
        """A hold on a slot, got within `patience_s` or not at all; see Lease."""
        self._numbers += 1
        return Lease(self, revision_id, self._numbers, patience_s)

    def thawed(self, instance_id: str, took_s: float) -> None:
        """A lease has thawed its instance."""
        if instance_id in self._instances:
            self.feed(Thawed(instance_id, took_s))

    def rejection(self, reject: Reject, revision_id: str) -> Rejected | StartError:
        """The error for a refused invocation; with the start's own error where that is the reason."""
        error = self.last_error(revision_id)
        if reject.reason is RejectReason.START_FAILED and error is not None:
            return StartError(
                error.message,
                hint=error.hint,
                log_tail=error.log_tail,
                permanent=error.permanent,
                backend_fault=error.backend_fault,
            )
        rejected = Rejected(reject.reason, reject.retry_after_s, reject.detail)
        if reject.reason is RejectReason.BACKEND_DOWN and self.backend_problem:
            rejected.message = self.backend_problem
        elif reject.reason is RejectReason.CRASH_LOOP and error is not None:
            rejected.message = f"its starts keep failing, so it is not started for a while; the last: {error.message}"
            rejected.hint = error.hint
        return rejected

    # --- recovery and the end ---

    def hold_starts(self, why: str) -> None:
        """Start nothing until release_starts(): what an earlier daemon left is to be found first."""
        self.feed(BackendDown(why))

    def release_starts(self) -> None:
        """See hold_starts(). While the engine does not answer, its return releases them."""
        if self.backend_problem is None:
            self.feed(BackendUp())

    def adopt(self, instance: Instance, age_s: float) -> None:
        """Take a prepared instance of an earlier daemon into the pool (see recovery.recover)."""
        self._instances[instance.id] = instance
        deployment = self._deployments[instance.revision.id]
        deployment.prepared += 1
        deployment.wake()
        self.feed(Adopted(instance.id, instance.revision.id, age_s))

    def deployment(self, revision_id: str) -> Deployment | None:
        """What is known of a deployed revision."""
        return self._deployments.get(revision_id)

    async def drain(self, timeout_s: float, *, keep: bool = False) -> bool:
        """Refuse what is new, let what runs end, stop the rest (with `keep`: leave idle instances running).

        True when all ended in time; else what still ran was cut. Cancel-safe: cancelling cuts at once.
        """
        self._draining = True
        self.feed(Drained(keep))
        in_time = False
        try:
            with trio.move_on_after(timeout_s):
                while not (in_time := self._is_empty(keep)) and not self._cut:
                    await self._emptied.wait()
        finally:
            if not in_time:
                with trio.CancelScope(shield=True), trio.move_on_after(10):
                    await self._execution.cut_all()
        return in_time

    def cut(self) -> None:
        """A drain under way shall not wait any longer."""
        self._cut = True
        self._note_emptied()

    def _is_empty(self, keep: bool) -> bool:
        busy = self._execution.starts or self._execution.stopping or self.core.host_stats().running
        return not busy and (keep or not self._instances)

    # --- actions ---

    def _perform(self, action: Action) -> None:
        if not self._running and type(action) is not Reject and type(action) is not Grant:
            self._pending.append(action)
        else:
            self._perform_by_type[type(action)](action)

    def _answer(self, action: Grant | Reject) -> None:
        self.waiting.pop(action.invocation).wake(action)

    # --- tasks ---

    async def _tick(self) -> None:
        while True:
            self._tick_wake = trio.Event()
            now_s = trio.current_time()
            self._tick_at_s = self._next_deadline()
            if self._tick_at_s <= now_s:
                self._tick_at_s = -math.inf
                self.feed(Ticked())
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_at(self._tick_at_s):
                await self._tick_wake.wait()

    async def _watch(self) -> None:
        async with contextlib.aclosing(self.backend.events()) as events:
            async for event in events:
                if isinstance(event, InstanceExited):
                    if event.instance_id in self._instances:
                        log.info("instance ended by itself", instance=event.instance_id, detail=event.detail)
                        self.feed(Died(event.instance_id, event.detail))
                elif isinstance(event, BackendLost):
                    log.error("the engine does not answer", detail=event.detail)
                    self.backend_problem = event.detail
                    self.feed(BackendDown(event.detail))
                elif isinstance(event, BackendBack):
                    log.info("the engine answers again")
                    self.backend_problem = None
                    self._execution.engine_back.set()
                    self._execution.engine_back = trio.Event()
                    self.feed(BackendUp())

    # --- small parts ---

    def _settled(self, event: Event) -> None:
        """A start, stop or freeze has ended."""
        self.feed(event)
        if self._removed and isinstance(event, Started | StartFailed | Stopped):
            for revision_id in list(self._removed):
                self._forget_if_gone(revision_id)

    def _forget_if_gone(self, revision_id: str) -> None:
        """A removed revision is forgotten with its last instance, and with a function's last what it printed."""
        if revision_id in self._removed and not self.core.instances(revision_id):
            self._removed.discard(revision_id)
            gone = self._deployments.pop(revision_id)
            gone.wake()
            name = gone.revision.spec.name
            if all(deployment.revision.spec.name != name for deployment in self._deployments.values()):
                self.logs.forget(name)

    def _note_emptied(self) -> None:
        self._emptied.set()
        self._emptied = trio.Event()
