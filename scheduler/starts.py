"""Which instances are started next: those somebody waits for, then those the floors lack. And what makes way."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.admission import Admission
from scheduler.ledger import Ledger
from scheduler.messages import Action, CancelStart, Start, Stop
from scheduler.model import InstanceState, StopReason
from scheduler.records import Instance, Revision

REFILL_LOOK_S = 0.1  # refills that lack memory look at what fell idle at most this often

_S = InstanceState


class Starts:
    """Turns wants into Start actions within max_starts, max_instances, the breaker and the memory budget.

    Functions take turns: one start each, then the next in the ring. Memory that is being freed for one is
    promised to it, so that a later, smaller one cannot take it away."""

    def __init__(self, ledger: Ledger, admission: Admission) -> None:
        self._ledger = ledger
        self._admission = admission
        self._host = ledger.host
        self._reach_mb: int | None = None  # what evicting could free, counted once in a round

    # --- wants --------------------------------------------------------------------------------------------

    def consider(self, revision: Revision) -> None:
        """Note what the revision may want; pump() looks closer."""
        if self._host.draining:
            return
        ledger = self._ledger
        if revision.queue:
            ledger.hungry.setdefault(revision)
        if revision.floor_missing > 0:
            ledger.refill.setdefault(revision)

    def ask_for(self, revision: Revision, now: float, out: list[Action]) -> None:
        """One more revision's queue wants a start. Cheap however many want one: it goes behind them."""
        host = self._host
        hungry = self._ledger.hungry
        if not hungry:
            hungry[revision] = None
            self.pump(now, out)
        elif host.backend_down is not None or host.breaker.blocks(now, host.starts_in_flight) or not self._has_start():
            hungry[revision] = None
        else:
            alone = {revision: None}
            host.promised_mb, short = self._turns(alone, self._wants_awaited, host.promised_mb, True, now, out)
            host.memory_short = host.memory_short or short
            hungry.update(alone)

    def queue_shrank(self, revision: Revision, now: float) -> None:
        """Waiters went away unserved: an instance that was kept for them may make way."""
        if self._host.memory_short and self._ledger.evictable(revision):
            self.look_soon(now)

    def pump(self, now: float, out: list[Action]) -> None:
        """Make the starts that are wanted and possible now."""
        host = self._host
        ledger = self._ledger
        if not ledger.hungry and not ledger.refill:
            host.memory_short = False
            return
        if host.draining or host.backend_down is not None:
            return
        if host.breaker.blocks(now, host.starts_in_flight):
            if now < host.breaker.until:
                ledger.timers.arm(host, host.breaker.until)
            return
        host.promised_mb, host.memory_short = self._turns(ledger.hungry, self._wants_awaited, 0, True, now, out)
        if ledger.refill:
            self._turns(ledger.refill, self._wants_refill, host.promised_mb, False, now, out)

    def _has_start(self) -> bool:
        host = self._host
        if host.breaker.opens and host.starts_in_flight:
            return False  # half open: one at a time
        return host.starts_in_flight < host.max_starts

    def _turns(
        self,
        ring: dict[Revision, None],
        wants: Callable[[Revision, float], int],
        promised: int,
        awaited: bool,
        now: float,
        out: list[Action],
    ) -> tuple[int, bool]:
        """Go round the ring while there are starts to give. Those who wait for memory stay at its front, those
        no start was left for behind them. Returns the memory promised, and whether somebody waits for some."""
        waiting: list[Revision] = []  # for memory
        self._reach_mb = None
        while ring and self._has_start():
            revision = next(iter(ring))
            del ring[revision]
            count = wants(revision, now)
            if not count:
                continue
            need_mb = revision.spec.memory_mb
            free_mb = self._host.memory_mb - self._host.memory_charged_mb - promised
            if need_mb <= free_mb:
                self._start(revision, now, awaited, out)
                ring[revision] = None
                continue
            waiting.append(revision)
            promised = self._promise(revision, count, promised, out)
        if waiting:
            rest = list(ring)
            ring.clear()
            ring.update(dict.fromkeys(waiting))
            ring.update(dict.fromkeys(rest))
        return promised, bool(waiting)

    def _promise(self, revision: Revision, count: int, promised: int, out: list[Action]) -> int:
        """Make way for up to `count` of its starts; the memory promised with theirs."""
        host = self._host
        need_mb = revision.spec.memory_mb
        for _ in range(min(count, host.max_starts - host.starts_in_flight)):
            coming_mb = host.memory_mb - host.memory_charged_mb + host.memory_freeing_mb - promised
            if not self._make_way(need_mb - coming_mb, out):
                break
            promised += need_mb
        return promised

    def _wants_awaited(self, revision: Revision, now: float) -> int:
        """How many more starts would help its queue."""
        room = revision.max_instances - revision.total
        if not revision.queue or room <= 0:
            return 0
        short = self._admission.short_of(revision)
        if short <= 0 or self._breaker_blocks(revision, now):
            return 0
        look_again_at = self._admission.drains_before_start(revision, short, now)
        if look_again_at is None:
            return min(room, -(-short // revision.slots))
        self._ledger.timers.arm(revision, look_again_at)
        return 0

    def _wants_refill(self, revision: Revision, now: float) -> int:
        """How many starts its floor lacks."""
        missing = min(revision.floor_missing, revision.max_instances - revision.total)
        if missing <= 0 or revision.spec.memory_mb > self._host.memory_mb:
            return 0
        return 0 if self._breaker_blocks(revision, now) else missing

    def _breaker_blocks(self, revision: Revision, now: float) -> bool:
        if not revision.breaker.blocks(now, len(revision.starting)):
            return False
        if now < revision.breaker.until:
            self._ledger.timers.arm(revision, revision.breaker.until)
        return True

    def _start(self, revision: Revision, now: float, awaited: bool, out: list[Action]) -> None:
        instance = self._ledger.add_instance(revision, now, awaited=awaited)
        out.append(Start(instance.id, revision.spec.revision, awaited))

    def look_soon(self, now: float) -> None:
        """Soon, not now: an idle instance may now make way for what lacks memory."""
        if self._has_start() and not self._host.breaker.blocks(now, self._host.starts_in_flight):
            self._ledger.timers.arm(self._host, now + REFILL_LOOK_S)

    # --- making way ---------------------------------------------------------------------------------------

    def _make_way(self, lacking_mb: int, out: list[Action]) -> bool:
        """Evict idle instances above their floors until `lacking_mb` more will come free. All or nothing:
        where they do not suffice none is stopped. True: it will come free."""
        if lacking_mb <= 0:
            return True
        ledger = self._ledger
        revisions = (*ledger.revisions.values(), *ledger.retired)
        if self._reach_mb is None:
            self._reach_mb = sum(ledger.evictable(each) * each.spec.memory_mb for each in revisions)
        if self._reach_mb < lacking_mb:
            return False
        candidates: list[tuple[tuple[float, int], Instance]] = []
        for each in revisions:
            count = ledger.evictable(each)
            if count:
                first_to_go = ledger.idle_by_rank(each)[:count]
                candidates += [(ledger.eviction_rank(instance), instance) for instance in first_to_go]
        candidates.sort(key=lambda candidate: candidate[0])
        for _, instance in candidates:
            if lacking_mb <= 0:
                break
            lacking_mb -= instance.revision.spec.memory_mb
            self._reach_mb -= instance.revision.spec.memory_mb
            self.retire(instance, StopReason.EVICTED, out)
        return True

    def retire(self, instance: Instance, reason: StopReason, out: list[Action]) -> None:
        """Stop an instance that serves nobody (or has died)."""
        self._ledger.move(instance, _S.STOPPING)
        if instance.doomed is None:
            instance.doomed = reason
        out.append(Stop(instance.id, reason))
        if instance.revision.queue:
            self._ledger.hungry.setdefault(instance.revision)

    def cancel(self, instance: Instance, reason: StopReason, out: list[Action]) -> None:
        """Give up a start."""
        self._ledger.move(instance, _S.STOPPING)
        if instance.doomed is None:
            instance.doomed = reason
        out.append(CancelStart(instance.id, reason))

    def trim(self, revision: Revision, out: list[Action]) -> None:
        """Stop what is above the ceiling: idle instances first, then starts. Busy ones go as they fall idle."""
        surplus = revision.live - revision.max_instances
        if surplus <= 0:
            return
        for instance in self._ledger.idle_by_rank(revision)[:surplus]:
            self.retire(instance, StopReason.SURPLUS, out)
            surplus -= 1
        for instance in list(reversed(revision.starting))[: max(0, surplus)]:
            self.cancel(instance, StopReason.SURPLUS, out)
