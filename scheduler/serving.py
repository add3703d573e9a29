"""Invocations: granted at once, queued, refused, released. The hot path is here."""

from __future__ import annotations

import math

from scheduler.admission import RETRY_UNKNOWN_S, Admission, retry_after
from scheduler.errors import InvariantError
from scheduler.granting import Granting
from scheduler.ledger import Ledger
from scheduler.lifecycle import transition
from scheduler.messages import Abandoned, Action, Freeze, Invoked, Reject, Released
from scheduler.model import InstanceState, RejectReason, StopReason
from scheduler.queues import Queues
from scheduler.records import Instance, Revision, Waiter
from scheduler.starts import Starts

_BUSY = InstanceState.BUSY
_IDLE = InstanceState.IDLE
_FROZEN = InstanceState.FROZEN

DRAINING_RETRY_S = 1.0
NO_SHARE = "the limits leave this function nothing: all is reserved for others, or its tenant's limit is 0"
FREEZE_AGAIN_S = 1.0  # shortest time to the next try where a freeze had to be put off


class Serving:
    """Gives slots to invocations and takes them back."""

    def __init__(
        self, ledger: Ledger, admission: Admission, starts: Starts, granting: Granting, queues: Queues
    ) -> None:
        self._ledger = ledger
        self._grant = granting.grant
        self._queues = queues
        self._admission = admission
        self._starts = starts
        self._host = ledger.host
        self._revisions = ledger.revisions
        self._leases = ledger.leases
        self._waiters = ledger.waiters
        self._timers = ledger.timers

    # --- asking -------------------------------------------------------------------------------------------

    def invoked(self, event: Invoked, now: float) -> list[Action]:
        invocation = event.invocation
        if invocation in self._leases or invocation in self._waiters:
            raise InvariantError(f"invocation {invocation} has asked already")
        revision = self._revisions.get(event.revision)
        if revision is not None and not revision.queue and not self._host.draining:
            host = self._host
            function = revision.function
            tenant = revision.tenant
            # The same question as Admission.ring_that_blocks, without the call.
            if (
                host.running < host.max_concurrency
                and tenant.running < tenant.limit
                and (function.running < function.reserved or host.shared_running < host.shared_max)
                and (revision.idle or revision.partial_mask or revision.frozen)
            ):
                return [self._grant(revision, invocation, 0, now)]
        out: list[Action] = []
        self._ask_in_vain(revision, event, now, out)
        return out

    def _ask_in_vain(self, revision: Revision | None, event: Invoked, now: float, out: list[Action]) -> None:
        """No slot at once: queue it, or refuse it with the reason."""
        if revision is None:
            out.append(Reject(event.invocation, RejectReason.UNKNOWN_REVISION))
            return
        refusal = self._no_hope(revision, event.invocation, now)
        if refusal is None and event.deadline <= now:
            retry_s = self._admission.queue_retry_s(revision)
            refusal = Reject(event.invocation, RejectReason.DEADLINE, retry_s, "no slot was free at once")
        if refusal is not None:
            self._queues.refuse(revision, refusal, out)
            return
        self._ledger.waiter_count += 1
        waiter = Waiter(
            invocation=event.invocation,
            number=self._ledger.waiter_count,
            revision=revision,
            since=now,
            deadline=event.deadline,
        )
        queue = revision.queue
        queue[event.invocation] = waiter
        # The start is decided before the refusal: where each comes too late for a start, one must still begin.
        if revision not in self._ledger.hungry:
            self._starts.ask_for(revision, now, out)
        refusal = self._too_much(revision, waiter, now)
        if refusal is not None:
            del queue[event.invocation]
            self._queues.refuse(revision, refusal, out)
            return
        self._waiters[event.invocation] = waiter
        self._timers.arm(waiter, event.deadline)
        if revision.blocked_in is None:
            self._queues.block(revision, self._admission.ring_that_blocks(revision))

    def _no_hope(self, revision: Revision, invocation: int, now: float) -> Reject | None:
        """The refusal of one that nothing could serve, whatever the queue."""
        host = self._host
        if host.draining:
            return Reject(invocation, RejectReason.DRAINING, DRAINING_RETRY_S, "the daemon is going down")
        if self._admission.ceiling(revision) <= 0:
            return Reject(invocation, RejectReason.CONCURRENCY_LIMIT, RETRY_UNKNOWN_S, NO_SHARE)
        if revision.ready or revision.starting:
            return None
        if revision.spec.memory_mb > host.memory_mb:
            detail = f"an instance needs {revision.spec.memory_mb} MB, the host's budget is {host.memory_mb} MB"
            return Reject(invocation, RejectReason.NO_CAPACITY, None, detail)
        if revision.max_instances == 0:
            return Reject(invocation, RejectReason.CONCURRENCY_LIMIT, None, "max_instances is 0")
        if host.backend_down is not None:
            return Reject(invocation, RejectReason.BACKEND_DOWN, RETRY_UNKNOWN_S, host.backend_down)
        breaker = revision.breaker
        if breaker.blocks(now, 0):
            return Reject(invocation, RejectReason.CRASH_LOOP, retry_after(breaker.until - now), breaker.detail)
        return None

    def _too_much(self, revision: Revision, waiter: Waiter, now: float) -> Reject | None:
        """The refusal of the newest of the queue, where the queue or its time is too short."""
        admission = self._admission
        queue_max = revision.spec.queue_max
        if len(revision.queue) > queue_max + revision.starting_slots:
            retry_s = admission.queue_retry_s(revision)
            if queue_max == 0:
                detail = "every slot is taken and queue_max is 0"
                return Reject(waiter.invocation, RejectReason.CONCURRENCY_LIMIT, retry_s, detail)
            detail = f"{queue_max} invocations are queued already"
            return Reject(waiter.invocation, RejectReason.QUEUE_FULL, retry_s, detail)
        wait_s = admission.predicted_wait_s(revision, now)
        has_s = waiter.deadline - now
        if wait_s is None or wait_s <= has_s:
            return None
        detail = f"it would wait about {wait_s:.3f} s and has {has_s:.3f} s"
        if wait_s == math.inf:
            return None
        return Reject(waiter.invocation, RejectReason.WOULD_MISS_DEADLINE, retry_after(wait_s - has_s), detail)

    def abandoned(self, event: Abandoned, now: float) -> list[Action]:
        waiter = self._waiters.get(event.invocation)
        if waiter is None:
            raise InvariantError(f"invocation {event.invocation} is abandoned, but it is not queued")
        self._queues.leave_queue(waiter)
        self._starts.queue_shrank(waiter.revision, now)
        return []

    # --- giving back --------------------------------------------------------------------------------------

    def released(self, event: Released, now: float) -> list[Action]:
        lease = self._leases.pop(event.invocation, None)
        if lease is None:
            raise InvariantError(f"invocation {event.invocation} is released, but it holds no slot")
        instance, granted_at = lease
        revision = instance.revision
        host = self._host
        function = revision.function
        if function.running > function.reserved:
            host.shared_running -= 1
        host.running -= 1
        function.running -= 1
        revision.tenant.running -= 1
        revision.running -= 1
        out: list[Action] = []
        if instance.state is not _BUSY:
            instance.leases -= 1  # it died under the invocation; its clean-up is on its way
            self._after_release(instance, now, out)
            return out
        if revision.slots > 1:
            self._ledger.drop_partial(instance)
        instance.leases -= 1
        if event.used:
            instance.served = True
            revision.service_s.add(now - granted_at)
        else:
            self._take_use_back(instance)
        if not event.healthy:
            self._ledger.doom(instance, StopReason.BROKEN)
        elif now >= instance.age_at:
            self._ledger.doom(instance, StopReason.AGED)
        if instance.leases:
            self._ledger.add_partial(instance)
        elif instance.doomed is not None:
            self._starts.retire(instance, instance.doomed, out)
        elif revision.live > revision.max_instances:
            self._starts.retire(instance, StopReason.SURPLUS, out)
        else:
            transition(instance, _IDLE)
            del revision.busy[instance]
            revision.idle[instance] = None
            instance.idle_since = now
        if (
            instance.doomed is not None
            or revision.queue
            or host.blocked
            or revision.tenant.blocked
            or host.owed
            or host.memory_short
        ):
            self._after_release(instance, now, out)
        # A timer that is set fires early and looks again, so a warm hit sets none.
        if instance.state is _IDLE:
            if instance.timer_at > now + revision.idle_delay or not revision.idle_delay:
                self.rest(instance, now, out)
            if self._ledger.refill:
                self._starts.look_soon(now)
        return out

    def _take_use_back(self, instance: Instance) -> None:
        instance.uses -= 1
        if instance.doomed is StopReason.USED_UP and instance.uses < instance.revision.max_uses:
            self._ledger.spare(instance)

    def _after_release(self, instance: Instance, now: float, out: list[Action]) -> None:
        """What else the end of a lease makes possible."""
        revision = instance.revision
        tenant = revision.tenant
        if revision.queue and revision.blocked_in is None and (self._host.blocked or tenant.blocked):
            # Others wait for the same limit: it takes its turn behind them.
            self._queues.block(revision, tenant.blocked if tenant.blocked else self._host.blocked)
        self._queues.serve_rings(revision, now, out)
        if revision.queue:
            self._queues.serve(revision, now, out)
        if instance.doomed is not None:
            self._starts.consider(revision)
            self._starts.pump(now, out)
            self._ledger.forget_if_gone(revision)
        elif self._host.memory_short and self._ledger.evictable(revision):
            self._starts.pump(now, out)

    def rest(self, instance: Instance, now: float, out: list[Action]) -> None:
        """An instance has fallen idle: freeze it at once, or note when to look at it."""
        revision = instance.revision
        spec = revision.spec
        if self._host.draining:
            return
        due = now + revision.idle_delay
        if spec.freeze_after_s == 0:
            due = now + revision.policy.keep_s(spec)
            if instance.freezable and (revision.queue or now < instance.freeze_not_before):
                due = min(due, now + FREEZE_AGAIN_S)
            elif instance.freezable:
                self._ledger.move(instance, _FROZEN)
                out.append(Freeze(instance.id))
        self._timers.arm(instance, min(due, instance.age_at))
