"""The choice of a slot: most recently used first, running before frozen, fullest before emptier."""

from __future__ import annotations

from scheduler.ledger import Ledger
from scheduler.lifecycle import transition
from scheduler.messages import Grant
from scheduler.model import InstanceState, StartKind, StopReason
from scheduler.records import Revision

_BUSY = InstanceState.BUSY


class Granting:
    """Takes slots. Part of the hot path."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._host = ledger.host
        self._leases = ledger.leases

    def grant(self, revision: Revision, invocation: int, waited_from: int, now: float) -> Grant:
        """Take a slot; there must be one. `waited_from`: the waiter's number, 0 for one that never waited."""
        frozen = False
        if revision.partial_mask:
            # The fullest first, so that the emptier ones fall idle; among equals the most recently used.
            fullest = revision.partial_mask.bit_length() - 1
            bucket = revision.partial[fullest]
            instance, _ = bucket.popitem()
            if not bucket:
                revision.partial_mask ^= 1 << fullest
        else:
            if revision.idle:
                instance, _ = revision.idle.popitem()
            else:
                instance, _ = revision.frozen.popitem()
                frozen = True
            transition(instance, _BUSY)
            revision.busy[instance] = None
        if not instance.served and waited_from and waited_from <= instance.ready_mark:
            kind = StartKind.COLD
        elif not instance.uses and not instance.served:
            kind = StartKind.PREWARMED
        else:
            kind = StartKind.THAWED if frozen else StartKind.WARM
        revision.totals[kind] += 1
        host = self._host
        function = revision.function
        if function.running >= function.reserved:
            host.shared_running += 1
        host.running += 1
        function.running += 1
        revision.tenant.running += 1
        revision.running += 1
        instance.leases += 1
        instance.uses += 1
        instance.granted_at = now
        self._leases[invocation] = (instance, now)
        if instance.uses >= revision.max_uses:
            self._ledger.doom(instance, StopReason.USED_UP)
        elif revision.slots > 1:
            self._ledger.add_partial(instance)
        return Grant(invocation, instance.id, kind, frozen)
