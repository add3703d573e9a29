"""Those who wait: one queue for each revision, and rings in which revisions take turns at a limit."""

from __future__ import annotations

from scheduler.admission import Admission
from scheduler.granting import Granting
from scheduler.ledger import Ledger
from scheduler.messages import Action, Reject
from scheduler.model import RejectReason
from scheduler.records import Revision, Waiter


class Queues:
    """Serves, refuses and moves queued invocations."""

    def __init__(self, ledger: Ledger, admission: Admission, granting: Granting) -> None:
        self._admission = admission
        self._granting = granting
        self._host = ledger.host
        self._waiters = ledger.waiters
        self._timers = ledger.timers

    def refuse(self, revision: Revision, refusal: Reject, out: list[Action]) -> None:
        rejections = revision.rejections
        rejections[refusal.reason] = rejections.get(refusal.reason, 0) + 1
        out.append(refusal)

    def leave_queue(self, waiter: Waiter) -> None:
        del waiter.revision.queue[waiter.invocation]
        del self._waiters[waiter.invocation]
        self._timers.disarm(waiter)

    def reject_waiter(
        self, waiter: Waiter, reason: RejectReason, retry_s: float | None, detail: str, out: list[Action]
    ) -> None:
        self.leave_queue(waiter)
        self.refuse(waiter.revision, Reject(waiter.invocation, reason, retry_s, detail), out)

    def reject_all(
        self, revision: Revision, reason: RejectReason, retry_s: float | None, detail: str, out: list[Action]
    ) -> None:
        for waiter in list(revision.queue.values()):
            self.reject_waiter(waiter, reason, retry_s, detail, out)

    def move_queue(self, origin: Revision, heir: Revision, out: list[Action]) -> None:
        """The queue of a removed revision goes to the one that replaces it, each at its place of arrival. Where
        the heir has a queue of its own too, the newest beyond the bound are refused."""
        bound = max(len(origin.queue), heir.spec.queue_max + heir.starting_slots)
        merged = sorted((*origin.queue.values(), *heir.queue.values()), key=lambda waiter: waiter.number)
        origin.queue.clear()
        heir.queue.clear()
        for waiter in merged:
            waiter.revision = heir
            heir.queue[waiter.invocation] = waiter
        retry_s = self._admission.queue_retry_s(heir)
        for waiter in merged[bound:]:
            detail = f"{bound} invocations are queued already"
            self.reject_waiter(waiter, RejectReason.QUEUE_FULL, retry_s, detail, out)

    def overdue(self, waiter: Waiter, now: float, out: list[Action]) -> None:
        """Its deadline has come."""
        retry_s = self._admission.queue_retry_s(waiter.revision)
        detail = f"no slot within {now - waiter.since:.3f} s"
        self.reject_waiter(waiter, RejectReason.DEADLINE, retry_s, detail, out)

    def serve(self, revision: Revision, now: float, out: list[Action]) -> None:
        """Grant to its queue while there are slots and the limits allow."""
        while self._serve_one(revision, now, out):
            pass

    def _serve_one(self, revision: Revision, now: float, out: list[Action]) -> bool:
        """Grant to the oldest of its queue. False: nobody waits, no slot is free, or a limit holds (then it
        waits in that limit's ring)."""
        if revision.blocked_in is not None:
            return False
        queue = revision.queue
        while queue:
            if not (revision.idle or revision.partial_mask or revision.frozen):
                return False
            waiter = next(iter(queue.values()))
            if waiter.deadline <= now:
                self.overdue(waiter, now, out)
                continue
            ring = self._admission.ring_that_blocks(revision)
            if ring is not None:
                self.block(revision, ring)
                return False
            self.leave_queue(waiter)
            out.append(self._granting.grant(revision, waiter.invocation, waiter.number, now))
            return True
        return False

    @staticmethod
    def block(revision: Revision, ring: dict[Revision, None] | None) -> None:
        if ring is not None:
            ring[revision] = None
            revision.blocked_in = ring

    def serve_rings(self, revision: Revision, now: float, out: list[Action]) -> None:
        """A lease of the revision has ended: those its tenant's and the host's limits kept waiting have their
        turn, one grant each."""
        tenant = revision.tenant
        if tenant.blocked:
            self._go_round(tenant.blocked, revision, now, out)
        if self._host.owed:
            self._go_round(self._host.owed, revision, now, out)
        if self._host.blocked:
            self._go_round(self._host.blocked, revision, now, out)

    def _go_round(self, ring: dict[Revision, None], freed: Revision, now: float, out: list[Action]) -> None:
        # Capacity that is reserved for the function whose lease ended is open to it alone.
        host = self._host
        own = [r for r in freed.function.revisions if r.blocked_in is ring] if freed.function.reserved else []
        for revision in own:
            if revision.function.running < revision.function.reserved:
                self.unblock(revision)
                self.serve(revision, now, out)
        tries = len(ring)
        while ring and tries > 0:
            if ring is host.owed:
                if host.running >= host.max_concurrency:
                    return
            elif ring is host.blocked:
                if host.running >= host.max_concurrency or host.shared_running >= host.shared_max:
                    return
            elif freed.tenant.running >= freed.tenant.limit:
                return
            revision = next(iter(ring))
            self.unblock(revision)
            if self._serve_one(revision, now, out):
                tries = len(ring) + 1
                if revision.queue and revision.blocked_in is None:
                    self.block(revision, ring)
            else:
                tries -= 1

    @staticmethod
    def unblock(revision: Revision) -> None:
        """Out of the ring of a limit, to be asked anew."""
        ring = revision.blocked_in
        if ring is not None:
            del ring[revision]
            revision.blocked_in = None
