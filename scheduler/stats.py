"""What the core shows of itself: frozen views, made on request, never on the hot path."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.breaker import BreakerState
from scheduler.ledger import Ledger
from scheduler.model import InstanceState, RejectReason, StartKind, StopReason
from scheduler.records import Instance, Revision


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionStats:
    """One revision now. Totals count from its Deployed on; estimates are None until measured."""

    revision: str
    function: str
    tenant: str
    removed: bool  # gone from the deployed ones; its last instances are ending
    min_instances: int
    max_instances: int
    slots: int
    memory_mb: int  # charged for all its instances
    instances: dict[InstanceState, int]
    queued: int
    running: int
    free_slots: int
    starts_in_flight: int
    breaker: BreakerState
    breaker_failures: int
    breaker_until: float | None  # on the clock of now; None: closed
    breaker_detail: str
    totals: dict[StartKind, int]
    rejections: dict[RejectReason, int]
    start_s: float | None
    service_s: float | None
    thaw_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """One instance now. Times on the clock of now."""

    id: str
    revision: str
    function: str
    state: InstanceState
    leases: int
    slots: int
    uses: int
    started_at: float  # when its Start was decided, or the age it was adopted with says so
    ready_at: float | None
    idle_since: float | None  # None: it is not idle
    charged_mb: int
    memory_mb: float | None  # the last sample
    awaited: bool
    doomed: StopReason | None  # why it takes no new invocation, or is stopping


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStats:
    """The whole host now."""

    revisions: int
    instances: int
    running: int
    queued: int
    max_concurrency: int
    reserved: int
    memory_mb: int
    memory_charged_mb: int
    memory_freeing_mb: int  # the part of it that stopping instances still hold
    starts_in_flight: int
    max_starts: int
    starts_wanted: int  # revisions that want a start which something holds back
    tenants: dict[str, int]  # invocations running
    backend_down: str | None
    draining: bool


def revision_stats(revision: Revision, now: float) -> RevisionStats:
    spec = revision.spec
    breaker = revision.breaker
    return RevisionStats(
        revision=spec.revision,
        function=spec.function,
        tenant=spec.tenant,
        removed=revision.removed,
        min_instances=revision.min_instances,
        max_instances=revision.max_instances,
        slots=revision.slots,
        memory_mb=revision.total * spec.memory_mb,
        instances={state: len(index) for state, index in revision.by_state.items()},
        queued=len(revision.queue),
        running=revision.running,
        free_slots=revision.free_slots,
        starts_in_flight=len(revision.starting),
        breaker=breaker.state(now),
        breaker_failures=breaker.failures,
        breaker_until=breaker.until if breaker.opens else None,
        breaker_detail=breaker.detail,
        totals=dict(revision.totals),
        rejections=dict(revision.rejections),
        start_s=revision.start_s.value_s,
        service_s=revision.service_s.value_s,
        thaw_s=revision.thaw_s.value_s,
    )


def instance_view(instance: Instance) -> InstanceView:
    spec = instance.revision.spec
    idle = instance.state in (InstanceState.IDLE, InstanceState.FROZEN)
    return InstanceView(
        id=instance.id,
        revision=spec.revision,
        function=spec.function,
        state=instance.state,
        leases=instance.leases,
        slots=spec.slots,
        uses=instance.uses,
        started_at=instance.started_at,
        ready_at=instance.ready_at,
        idle_since=instance.idle_since if idle else None,
        charged_mb=spec.memory_mb,
        memory_mb=instance.memory_mb,
        awaited=instance.awaited,
        doomed=instance.doomed,
    )


def host_stats(ledger: Ledger) -> HostStats:
    host = ledger.host
    return HostStats(
        revisions=len(ledger.revisions),
        instances=len(ledger.instances),
        running=host.running,
        queued=len(ledger.waiters),
        max_concurrency=host.max_concurrency,
        reserved=host.max_concurrency - host.shared_max,
        memory_mb=host.memory_mb,
        memory_charged_mb=host.memory_charged_mb,
        memory_freeing_mb=host.memory_freeing_mb,
        starts_in_flight=host.starts_in_flight,
        max_starts=host.max_starts,
        starts_wanted=len(ledger.hungry.keys() | ledger.refill.keys()),
        tenants={name: tenant.running for name, tenant in ledger.tenants.items()},
        backend_down=host.backend_down,
        draining=host.draining,
    )
