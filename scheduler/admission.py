"""May it run now, would a start help, how long would it wait: questions answered from counts and measurements."""

from __future__ import annotations

import math

from scheduler.ledger import Ledger
from scheduler.records import Revision

RETRY_MIN_S = 0.1
RETRY_MAX_S = 300.0
RETRY_UNKNOWN_S = 1.0  # when nothing was measured


def retry_after(seconds: float) -> float:
    """A time to retry after: never 0, never absurd."""
    return min(max(seconds, RETRY_MIN_S), RETRY_MAX_S)


class Admission:
    """Reads the ledger, changes nothing."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._host = ledger.host

    def ring_that_blocks(self, revision: Revision) -> dict[Revision, None] | None:
        """None: one more invocation of the revision may run. Else where it waits for its turn: the ring of
        its tenant's limit or of the host's."""
        host = self._host
        tenant = revision.tenant
        function = revision.function
        if tenant.running >= tenant.limit:
            return tenant.blocked
        if host.running >= host.max_concurrency:
            # Full although some of it is reserved: what others run is from before that was deployed.
            return host.owed if function.running < function.reserved else host.blocked
        if function.running >= function.reserved and host.shared_running >= host.shared_max:
            return host.blocked
        return None

    def ceiling(self, revision: Revision) -> int:
        """Invocations of its function that could ever run at a time under the limits."""
        return min(self._host.shared_max + revision.function.reserved, revision.tenant.limit)

    def short_of(self, revision: Revision) -> int:
        """Slots that its waiters lack: beyond those free, those being started, and what limits let run."""
        room = self.ceiling(revision) - revision.running
        return min(len(revision.queue), room) - revision.starting_slots - revision.free_slots

    def serving_slots(self, revision: Revision) -> int:
        """Leases whose end gives a slot to the queue."""
        busy = len(revision.busy) - revision.doomed_busy
        return min(busy * revision.slots, revision.running)

    def drain_s(self, revision: Revision, waiting: int) -> float | None:
        """Seconds until releases alone have served `waiting` of its queue; None: not known; inf: never."""
        serving = self.serving_slots(revision)
        if not serving:
            return math.inf
        service_s = revision.service_s.value_s
        return None if service_s is None else waiting * service_s / serving

    def predicted_wait_s(self, revision: Revision, now: float) -> float | None:
        """Seconds until the newest of its queue has a slot, from measured times only; None: not known.

        Releases go on at serving/service; at the end of the first wave of starts their slots join. Where it
        must guess it takes the shorter: a refusal has to be right, a wait corrects itself at the deadline."""
        if revision.free_slots:
            return None  # it waits for a limit, and what others' releases do for it was not measured
        place = len(revision.queue)
        drain = self.drain_s(revision, place)
        if drain is None:
            return None
        service_s = revision.service_s.value_s
        serving = self.serving_slots(revision)
        if serving and service_s:
            # The invocation that has run longest ends first: what it has run is not waited for again.
            longest_s = now - next(iter(revision.busy)).granted_at
            drain -= min(longest_s, service_s / serving)
        start_s = revision.start_s.value_s
        if start_s is None:
            may_start = revision.starting or revision.total < revision.max_instances
            return None if may_start else drain
        host = self._host
        wave_at = start_s
        slots = revision.starting_slots
        if revision.starting:
            wave_at = max(0.0, start_s - (now - next(iter(revision.starting)).started_at))
        room = revision.max_instances - revision.total
        if room > 0:
            slots += min(room, host.max_starts) * revision.slots
        if not slots or drain <= wave_at:
            return drain
        done = wave_at * serving / service_s if service_s else 0.0
        left = place - done - slots
        if left <= 0 or not service_s:
            return wave_at
        return wave_at + left * service_s / (serving + slots)

    def drains_before_start(self, revision: Revision, short: int, now: float) -> float | None:
        """The time until which no start is made because releases will have served the queue by then; None:
        start. Only on measurements, and only while the oldest waiter has not waited as long as a start takes:
        after that the prediction was wrong."""
        start_s = revision.start_s.value_s
        if start_s is None or len(revision.queue) > revision.spec.queue_max:
            return None
        drain = self.drain_s(revision, short)
        if drain is None or drain >= start_s:
            return None
        oldest = next(iter(revision.queue.values()))
        look_again_at = oldest.since + start_s
        return look_again_at if look_again_at > now else None

    def queue_retry_s(self, revision: Revision) -> float:
        """When a queue that is full now will have drained, as far as measurements tell."""
        drain = self.drain_s(revision, len(revision.queue))
        if drain is None or drain == math.inf:
            return retry_after(revision.start_s.value_s or RETRY_UNKNOWN_S)
        return retry_after(drain)
