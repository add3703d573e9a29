"""What becomes of instances: starts that end, deaths, freezing, samples, and what falls due with time."""

from __future__ import annotations

import math
from collections.abc import Callable

from scheduler.admission import RETRY_UNKNOWN_S, Admission, retry_after
from scheduler.errors import InvariantError
from scheduler.ledger import Ledger
from scheduler.lifecycle import require
from scheduler.messages import (
    Action,
    Adopted,
    Died,
    Freeze,
    FreezeFailed,
    Frozen,
    Sampled,
    Started,
    StartFailed,
    Stop,
    Stopped,
    Thawed,
    Ticked,
)
from scheduler.model import InstanceState, RejectReason, StopReason
from scheduler.queues import Queues
from scheduler.records import Host, Instance, Revision, Waiter
from scheduler.serving import FREEZE_AGAIN_S, NO_SHARE, Serving
from scheduler.starts import Starts

_S = InstanceState


class Upkeep:
    """Follows each instance from its start to its end.

    News of an instance that is gone (Died, Frozen, FreezeFailed, Thawed, Sampled) is ignored: observers lag.
    The answers to commands (Started, StartFailed, Stopped) must match what was asked, else InvariantError."""

    def __init__(
        self,
        ledger: Ledger,
        admission: Admission,
        starts: Starts,
        queues: Queues,
        serving: Serving,
        draw: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._host = ledger.host
        self._starts = starts
        self._queues = queues
        self._serving = serving
        self._admission = admission
        self._draw = draw

    def settle(self, revision: Revision, now: float, out: list[Action]) -> None:
        """Something changed for the revision: serve its queue, refuse what nothing can serve any more, start
        what is missing, forget it when it is gone."""
        if revision.queue:
            self._queues.serve(revision, now, out)
        if revision.queue:
            self.refuse_stranded(revision, now, out)
        if not revision.removed:
            self._starts.consider(revision)
            breaker = revision.breaker
            if breaker.opens and now < breaker.until:
                self._ledger.timers.arm(revision, breaker.until)
        self._starts.pump(now, out)
        self._ledger.forget_if_gone(revision)

    def refuse_stranded(self, revision: Revision, now: float, out: list[Action]) -> None:
        """Refuse the queue of a revision that has no instance, none starting and may start none, or that the
        limits leave nothing."""
        reject_all = self._queues.reject_all
        if self._admission.ceiling(revision) <= 0:
            reject_all(revision, RejectReason.CONCURRENCY_LIMIT, RETRY_UNKNOWN_S, NO_SHARE, out)
        if revision.ready or revision.starting:
            return
        breaker = revision.breaker
        if revision.max_instances == 0:
            reject_all(revision, RejectReason.CONCURRENCY_LIMIT, None, "max_instances is 0", out)
        elif self._host.backend_down is not None:
            detail = self._host.backend_down
            reject_all(revision, RejectReason.BACKEND_DOWN, RETRY_UNKNOWN_S, detail, out)
        elif breaker.blocks(now, 0):
            if breaker.permanent:
                reject_all(revision, RejectReason.START_FAILED, None, breaker.detail, out)
            else:
                retry_s = retry_after(breaker.until - now)
                reject_all(revision, RejectReason.CRASH_LOOP, retry_s, breaker.detail, out)

    def _expected(self, identity: str, event: str) -> Instance:
        instance = self._ledger.instances.get(identity)
        if instance is None:
            raise InvariantError(f"{event} for instance {identity}, which the core does not know")
        return instance

    # --- starts that end ----------------------------------------------------------------------------------

    def started(self, event: Started, now: float) -> list[Action]:
        instance = self._expected(event.instance, "Started")
        require(instance, _S.STARTING, _S.STOPPING, event="Started")
        if instance.ready_at is not None:
            raise InvariantError(f"Started for instance {instance.id} a second time")
        out: list[Action] = []
        instance.ready_at = now
        if instance.state is _S.STOPPING:
            # Its start was cancelled too late to matter.
            out.append(Stop(instance.id, instance.doomed or StopReason.SURPLUS))
            return out
        revision = instance.revision
        revision.start_s.add(now - instance.started_at)
        self._host.breaker.close()
        if instance.doomed is not None:  # it died meanwhile
            revision.breaker.failed(now, "the instance exited while it was started", self._draw)
            self._starts.retire(instance, instance.doomed, out)
            self.settle(revision, now, out)
            return out
        breaker = revision.breaker
        instance.prior_failures = breaker.failures
        instance.prior_opens = breaker.opens
        breaker.close()
        self._become_idle(instance, now, out)
        return out

    def _become_idle(self, instance: Instance, now: float, out: list[Action]) -> None:
        """A new instance is ready: to the queue, or to the pool."""
        revision = instance.revision
        instance.ready_mark = self._ledger.waiter_count
        instance.idle_since = now
        self._ledger.move(instance, _S.IDLE)
        if revision.live > revision.max_instances:
            self._starts.retire(instance, StopReason.SURPLUS, out)
        self.settle(revision, now, out)
        if instance.state is _S.IDLE:
            self._serving.rest(instance, now, out)
        if revision.held:
            self.look_at_idle(revision, now)

    def look_at_idle(self, revision: Revision, now: float) -> None:
        """Let keep-alive be asked anew of every idle instance: the floor no longer holds the same ones."""
        revision.held = False
        for instance in (*revision.idle, *revision.frozen):
            self._ledger.timers.arm(instance, now)

    def start_failed(self, event: StartFailed, now: float) -> list[Action]:
        instance = self._expected(event.instance, "StartFailed")
        require(instance, _S.STARTING, _S.STOPPING, event="StartFailed")
        if instance.ready_at is not None:
            raise InvariantError(f"StartFailed for instance {instance.id}, which has Started")
        out: list[Action] = []
        revision = instance.revision
        cancelled = instance.state is _S.STOPPING
        self._ledger.move(instance, _S.DEAD)
        if not cancelled:
            breaker = self._host.breaker if event.backend_fault else revision.breaker
            permanent = event.permanent and not event.backend_fault
            breaker.failed(now, event.detail, self._draw, permanent=permanent)
            self._refuse_failed(revision, event, now, out)
        self.settle(revision, now, out)
        return out

    def _refuse_failed(self, revision: Revision, event: StartFailed, now: float, out: list[Action]) -> None:
        """A failed start refuses the oldest waiters, one for each slot it would have given, unless a running
        instance or another start serves them. They are not tried again in secret."""
        if revision.ready:
            return
        unserved = len(revision.queue) - revision.starting_slots
        breaker = self._host.breaker if event.backend_fault else revision.breaker
        retry_s = retry_after(breaker.until - now if breaker.opens else self._ledger.limits.breaker_base_s)
        hint_s = None if event.permanent and not event.backend_fault else retry_s
        for waiter in list(revision.queue.values())[: max(0, min(unserved, revision.slots))]:
            self._queues.reject_waiter(waiter, RejectReason.START_FAILED, hint_s, event.detail, out)

    def adopted(self, event: Adopted, now: float) -> list[Action]:
        ledger = self._ledger
        revision = ledger.revisions.get(event.revision)
        if revision is None:
            raise InvariantError(f"Adopted {event.instance} of revision {event.revision}, which is not deployed")
        if event.instance in ledger.instances:
            raise InvariantError(f"Adopted {event.instance}, which the core has already")
        out: list[Action] = []
        host = self._host
        instance = ledger.add_instance(revision, now, identity=event.instance, age_s=event.age_s)
        instance.served = True
        instance.ready_at = now
        if host.memory_charged_mb > host.memory_mb or (host.draining and not host.keep):
            reason = StopReason.DRAINING if host.draining else StopReason.EVICTED
            instance.idle_since = now
            ledger.move(instance, _S.IDLE)
            self._starts.retire(instance, reason, out)
            self.settle(revision, now, out)
        else:
            self._become_idle(instance, now, out)
        return out

    # --- ends ---------------------------------------------------------------------------------------------

    def stopped(self, event: Stopped, now: float) -> list[Action]:
        instance = self._expected(event.instance, "Stopped")
        require(instance, _S.STOPPING, event="Stopped")
        out: list[Action] = []
        self._ledger.move(instance, _S.DEAD)
        self.settle(instance.revision, now, out)
        return out

    def died(self, event: Died, now: float) -> list[Action]:
        instance = self._ledger.instances.get(event.instance)
        if instance is None or instance.state is _S.STOPPING:
            return []
        if instance.state is _S.STARTING:
            self._ledger.doom(instance, StopReason.DIED)  # its start ends by Started or StartFailed all the same
            return []
        out: list[Action] = []
        revision = instance.revision
        unused = not instance.served and not instance.uses
        self._starts.retire(instance, StopReason.DIED, out)
        if unused and instance.ready_at is not None:
            breaker = revision.breaker
            if now - instance.ready_at < breaker.max_s:
                breaker.failures = max(breaker.failures, instance.prior_failures)
                breaker.opens = max(breaker.opens, instance.prior_opens)
            detail = event.detail or "the instance exited before its first invocation"
            breaker.failed(now, detail, self._draw)
        self.settle(revision, now, out)
        return out

    # --- freezing and samples -----------------------------------------------------------------------------

    def frozen(self, event: Frozen, now: float) -> list[Action]:
        self._running(event.instance, "Frozen")
        return []

    def _running(self, identity: str, event: str) -> Instance | None:
        """The instance; None when it is gone. Raises InvariantError when it has not even started."""
        instance = self._ledger.instances.get(identity)
        if instance is not None and instance.state is _S.STARTING:
            raise InvariantError(f"{event} for instance {identity}, which is {instance.state}")
        return instance

    def freeze_failed(self, event: FreezeFailed, now: float) -> list[Action]:
        instance = self._running(event.instance, "FreezeFailed")
        if instance is None:
            return []
        out: list[Action] = []
        if event.permanent:
            instance.freezable = False
        else:
            instance.freeze_not_before = now + max(FREEZE_AGAIN_S, instance.revision.spec.freeze_after_s or 0.0)
        if instance.state is _S.FROZEN:
            self._ledger.back_to_idle(instance)
            self.look(instance, now, out)
        return out

    def thawed(self, event: Thawed, now: float) -> list[Action]:
        instance = self._running(event.instance, "Thawed")
        if instance is not None:
            instance.revision.thaw_s.add(event.took_s)
        return []

    def sampled(self, event: Sampled, now: float) -> list[Action]:
        instance = self._ledger.instances.get(event.instance)
        if instance is None or instance.state is _S.STOPPING:
            return []
        instance.memory_mb = event.memory_mb
        revision = instance.revision
        most_mb = revision.spec.max_memory_mb
        out: list[Action] = []
        if most_mb is None or event.memory_mb <= most_mb or instance.state is _S.STARTING:
            return out
        if instance.state is _S.BUSY:
            self._ledger.doom(instance, StopReason.MEMORY_GROWTH)
        elif not self._host.draining:
            self._starts.retire(instance, StopReason.MEMORY_GROWTH, out)
        self.settle(revision, now, out)
        return out

    # --- time ---------------------------------------------------------------------------------------------

    def ticked(self, event: Ticked, now: float) -> list[Action]:
        out: list[Action] = []
        timers = self._ledger.timers
        while (owner := timers.pop_due(now)) is not None:
            if isinstance(owner, Waiter):
                self._queues.overdue(owner, now, out)
                self._starts.queue_shrank(owner.revision, now)
            elif isinstance(owner, Instance):
                self.look(owner, now, out)
            elif isinstance(owner, Revision):
                self._look_at_revision(owner, now, out)
            elif isinstance(owner, Host):
                self._starts.pump(now, out)
        return out

    def _look_at_revision(self, revision: Revision, now: float, out: list[Action]) -> None:
        """Its back-off is over, or its queue has waited for releases long enough."""
        if revision.floor_missing > 0:
            self.settle(revision, now, out)
        elif revision.queue and revision not in self._ledger.hungry:
            self._starts.ask_for(revision, now, out)

    def look(self, instance: Instance, now: float, out: list[Action]) -> None:
        """An instance's time has come, or may have: stop it, freeze it, or look again later."""
        revision = instance.revision
        if self._host.draining:
            return
        if instance.state is _S.BUSY:
            if now >= instance.age_at:
                self._ledger.doom(instance, StopReason.AGED)
                self.settle(revision, now, out)
            return  # its release looks again
        if now >= instance.age_at and not self._age_must_wait(revision):
            self._starts.retire(instance, StopReason.AGED, out)
            self.settle(revision, now, out)
            return
        expires_at = instance.idle_since + revision.policy.keep_s(revision.spec)
        if now >= expires_at:
            if self._ledger.evictable(revision) > 0:
                self._starts.retire(instance, StopReason.EXPIRED, out)
                self.settle(revision, now, out)
                return
            if revision.queue:
                expires_at = now + FREEZE_AGAIN_S
            else:
                revision.held = True
                expires_at = math.inf
        due = min(expires_at, self._freeze(instance, now, out))
        aged_at = instance.age_at if now < instance.age_at else now + FREEZE_AGAIN_S
        self._ledger.timers.arm(instance, min(due, aged_at))

    @staticmethod
    def _age_must_wait(revision: Revision) -> bool:
        """A floor whose instances are all of one age is renewed one by one."""
        renewing = len(revision.starting) + len(revision.stopping)
        return renewing > 0 and revision.ready <= revision.min_instances

    def _freeze(self, instance: Instance, now: float, out: list[Action]) -> float:
        """Freeze it if it is time. Returns when to ask again; inf: never."""
        revision = instance.revision
        freeze_after_s = revision.spec.freeze_after_s
        if instance.state is not _S.IDLE or not instance.freezable or freeze_after_s is None:
            return math.inf
        at = max(instance.idle_since + freeze_after_s, instance.freeze_not_before)
        if now < at:
            return at
        if revision.queue:
            return now + max(freeze_after_s, FREEZE_AGAIN_S)
        self._ledger.move(instance, _S.FROZEN)
        out.append(Freeze(instance.id))
        return math.inf
