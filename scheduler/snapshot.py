"""The state of the core as plain tuples, taken fast, and put back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from scheduler.errors import JournalError
from scheduler.history import Estimate
from scheduler.ledger import Ledger
from scheduler.lifecycle import place
from scheduler.model import InstanceState, RejectReason, RevisionSpec, StartKind, StopReason
from scheduler.records import Instance, Revision, Timed, Waiter

Plain = tuple[Any, ...]  # numbers, texts, None, or tuples of these

_TIMER = ("timer_at", "timer_id")
_INSTANCE = (
    "id", "number", "started_at", "age_at", "state", "ready_at", "ready_mark", "idle_since",
    "granted_at", "leases", "uses",
    "served", "awaited", "doomed", "memory_mb", "freezable", "freeze_not_before", "prior_failures", "prior_opens",
    *_TIMER,
)  # fmt: skip
_REVISION = ("number", "min_instances", "max_instances", "removed", "held", *_TIMER)
_WAITER = ("invocation", "number", "since", "deadline", *_TIMER)
_BREAKER = ("failures", "opens", "until", "detail", "permanent")
_ESTIMATE = ("value_s", "samples")
_HOST = ("draining", "keep", "backend_down", "memory_short", "promised_mb", *_TIMER)
_COUNTS = ("instance_count", "waiter_count", "revision_count")
_ESTIMATES = ("start_s", "service_s", "thaw_s")

_of_instance = attrgetter(*_INSTANCE)
_of_revision = attrgetter(*_REVISION)
_of_waiter = attrgetter(*_WAITER)
_of_breaker = attrgetter(*_BREAKER)
_of_estimate = attrgetter(*_ESTIMATE)
_of_host = attrgetter(*_HOST)


@dataclass(frozen=True, slots=True)
class RevisionState:
    spec: RevisionSpec
    fields: Plain
    breaker: Plain
    estimates: Plain
    totals: Plain
    rejections: Plain
    queue: Plain
    instances: Plain  # by state, each in the order of its index
    partial: Plain  # numbers of instances, by bucket


@dataclass(frozen=True, slots=True)
class State:
    """A whole core. Revisions and instances are named by number."""

    counts: Plain
    host: Plain
    host_breaker: Plain
    revisions: tuple[RevisionState, ...]
    lost: Plain  # (revision, instance) that are stopped while invocations still hold them
    leases: Plain  # (invocation, instance, since)
    rings: Plain  # hungry, refill, blocked by the host, owed by it, blocked by each tenant


def capture(ledger: Ledger) -> State:
    """The state now, in nothing but immutable values. O(revisions + instances + invocations)."""
    records = (*ledger.revisions.values(), *ledger.retired)
    host = ledger.host
    lost = {lease[0]: None for lease in ledger.leases.values() if lease[0].state is InstanceState.DEAD}
    return State(
        counts=(ledger.instance_count, ledger.waiter_count, ledger.revision_count, ledger.timers.count),
        host=_of_host(host),
        host_breaker=_of_breaker(host.breaker),
        revisions=tuple([_revision_state(revision) for revision in records]),
        lost=tuple((each.revision.number, _of_instance(each)) for each in lost),
        leases=tuple([(invocation, lease[0].number, lease[1]) for invocation, lease in ledger.leases.items()]),
        rings=(
            _numbers(ledger.hungry),
            _numbers(ledger.refill),
            _numbers(host.blocked),
            _numbers(host.owed),
            tuple((tenant.name, _numbers(tenant.blocked)) for tenant in ledger.tenants.values()),
        ),
    )


def _numbers(records: Iterable[Revision] | Iterable[Instance]) -> Plain:
    return tuple([record.number for record in records])


def _revision_state(revision: Revision) -> RevisionState:
    return RevisionState(
        spec=revision.spec,
        fields=_of_revision(revision),
        breaker=_of_breaker(revision.breaker),
        estimates=tuple(_of_estimate(getattr(revision, name)) for name in _ESTIMATES),
        totals=tuple(revision.totals.values()),
        rejections=tuple(revision.rejections.items()),
        queue=tuple(map(_of_waiter, revision.queue.values())),
        instances=tuple([tuple(map(_of_instance, index)) for index in revision.by_state.values()]),
        partial=tuple([_numbers(bucket) for bucket in revision.partial]),
    )


def restore(ledger: Ledger, state: State) -> None:
    """Put a state into the ledger of a new core. Raises JournalError when it does not fit together."""
    try:
        _Restoring(ledger).run(state)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise JournalError(f"the journal's state does not fit together: {error}") from error


def _assign(record: object, names: tuple[str, ...], values: Plain) -> None:
    for name, value in zip(names, values, strict=True):
        setattr(record, name, value)


class _Restoring:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._revisions: dict[int, Revision] = {}
        self._instances: dict[int, Instance] = {}
        self._timed: list[Timed] = [ledger.host]

    def run(self, state: State) -> None:
        ledger = self._ledger
        host = ledger.host
        _assign(host, _HOST, state.host)
        _assign(host.breaker, _BREAKER, state.host_breaker)
        for name, _ in state.rings[-1]:
            ledger.tenant_named(name)  # in the order they had
        for revision_state in state.revisions:
            self._revision(revision_state)
        for number, values in state.lost:
            self._instance(self._revisions[number], values)
        for invocation, number, since in state.leases:
            self._lease(invocation, self._instances[number], since)
        for number in sorted(self._instances):
            instance = self._instances[number]
            if instance.state is not InstanceState.DEAD:
                ledger.instances[instance.id] = instance
        self._rings(state.rings)
        ledger.recount_reserved()
        *counts, timers = state.counts
        _assign(ledger, _COUNTS, tuple(counts))
        ledger.timers.restore(self._timed, timers)

    def _revision(self, state: RevisionState) -> None:
        ledger = self._ledger
        revision = ledger.new_revision(state.spec)
        _assign(revision, _REVISION, state.fields)
        if revision.removed:
            ledger.retired[revision] = None
        else:
            ledger.revisions[state.spec.revision] = revision
        _assign(revision.breaker, _BREAKER, state.breaker)
        for name, values in zip(_ESTIMATES, state.estimates, strict=True):
            estimate: Estimate = getattr(revision, name)
            _assign(estimate, _ESTIMATE, values)
        revision.totals = dict(zip(StartKind, state.totals, strict=True))
        revision.rejections = {RejectReason(reason): n for reason, n in state.rejections}
        self._revisions[revision.number] = revision
        self._timed.append(revision)
        for values in state.queue:
            waiter = Waiter(invocation=0, number=0, revision=revision, since=0.0, deadline=0.0)
            _assign(waiter, _WAITER, values)
            revision.queue[waiter.invocation] = waiter
            ledger.waiters[waiter.invocation] = waiter
            self._timed.append(waiter)
        for index in state.instances:
            for values in index:
                self._count(self._instance(revision, values))
        for leases, numbers in enumerate(state.partial):
            for number in numbers:
                revision.partial[leases][self._instances[number]] = None
                revision.partial_mask |= 1 << leases

    def _instance(self, revision: Revision, values: Plain) -> Instance:
        instance = Instance(id="", number=0, revision=revision, started_at=0.0)
        _assign(instance, _INSTANCE, values)
        # A state that was lawful when it was captured; it is put back, not moved to.
        place(instance, InstanceState(instance.state))
        if instance.doomed is not None:
            instance.doomed = StopReason(instance.doomed)
        self._instances[instance.number] = instance
        self._timed.append(instance)
        return instance

    def _count(self, instance: Instance) -> None:
        revision = instance.revision
        host = self._ledger.host
        state = instance.state
        revision.by_state[state][instance] = None
        host.memory_charged_mb += revision.spec.memory_mb
        if state is InstanceState.STOPPING:
            host.memory_freeing_mb += revision.spec.memory_mb
        else:
            revision.live += 1
        if state is InstanceState.STARTING:
            host.starts_in_flight += 1
        if state is InstanceState.BUSY and instance.doomed is not None:
            revision.doomed_busy += 1

    def _lease(self, invocation: int, instance: Instance, since: float) -> None:
        ledger = self._ledger
        revision = instance.revision
        ledger.leases[invocation] = (instance, since)
        ledger.host.running += 1
        revision.running += 1
        revision.function.running += 1
        revision.tenant.running += 1

    def _rings(self, rings: Plain) -> None:
        ledger = self._ledger
        hungry, refill, host_blocked, host_owed, tenants_blocked = rings
        by_number = self._revisions
        ledger.hungry.update(dict.fromkeys(by_number[number] for number in hungry))
        ledger.refill.update(dict.fromkeys(by_number[number] for number in refill))
        blocked = [(ledger.host.blocked, host_blocked), (ledger.host.owed, host_owed)]
        blocked += [(ledger.tenants[name].blocked, numbers) for name, numbers in tenants_blocked]
        for ring, numbers in blocked:
            for number in numbers:
                ring[by_number[number]] = None
                by_number[number].blocked_in = ring
