"""What users and the daemon ask for: deploy, remove, scale, recycle, drain; and the backend's own state."""

from __future__ import annotations

from scheduler.errors import ConfigurationError, InvariantError
from scheduler.ledger import Ledger
from scheduler.messages import (
    Action,
    BackendDown,
    BackendUp,
    BreakerReset,
    Deployed,
    Drained,
    Recycled,
    Removed,
    Scaled,
)
from scheduler.model import HostLimits, RejectReason, RevisionSpec, StopReason
from scheduler.queues import Queues
from scheduler.records import Revision
from scheduler.serving import DRAINING_RETRY_S
from scheduler.starts import Starts
from scheduler.upkeep import Upkeep


def _refuse(owner: str, problems: list[str]) -> None:
    if problems:
        raise ConfigurationError(f"{owner}: {'; '.join(problems)}")


def check_limits(limits: HostLimits) -> None:
    """Raises ConfigurationError with everything that is wrong."""
    least = {
        "memory_mb": 1,
        "max_concurrency": 1,
        "max_starts": 1,
        "breaker_failures": 1,
        "journal_entries": 0,
    }
    problems = [
        f"{name} is {getattr(limits, name)}, at least {value} is needed"
        for name, value in least.items()
        if getattr(limits, name) < value
    ]
    if not 0 < limits.breaker_base_s <= limits.breaker_max_s:
        problems.append("breaker_base_s must be more than 0 and at most breaker_max_s")
    tenants = {"tenant_concurrency": limits.tenant_concurrency, **limits.tenant_overrides}
    problems += [f"the limit {name} is {n}, less than 0" for name, n in tenants.items() if n is not None and n < 0]
    _refuse("host limits", problems)


def check_spec(spec: RevisionSpec) -> None:
    """Raises ConfigurationError with everything that is wrong."""
    least: dict[str, float] = {
        "slots": 1,
        "min_instances": 0,
        "max_instances": 0,
        "memory_mb": 1,
        "reserved": 0,
        "queue_max": 0,
        "keepalive_s": 0,
        "freeze_after_s": 0,
        "max_uses": 1,
        "max_memory_mb": 1,
    }
    problems = []
    for name, value in least.items():
        given = getattr(spec, name)
        if given is not None and not given >= value:
            problems.append(f"{name} is {given}, at least {value} is needed")
    if spec.max_age_s is not None and not spec.max_age_s > 0:
        problems.append(f"max_age_s is {spec.max_age_s}, more than 0 is needed")
    problems += _floor_problems(spec.min_instances, spec.max_instances)
    _refuse(f"revision {spec.revision}", problems)


def _floor_problems(low: int, high: int) -> list[str]:
    return [f"min_instances {low} is more than max_instances {high}"] if low > high else []


class Deployments:
    """Changes what the pools should be; upkeep and starts bring them there."""

    def __init__(self, ledger: Ledger, starts: Starts, queues: Queues, upkeep: Upkeep) -> None:
        self._ledger = ledger
        self._host = ledger.host
        self._starts = starts
        self._queues = queues
        self._upkeep = upkeep

    def _revision(self, name: str, event: str) -> Revision:
        revision = self._ledger.revisions.get(name)
        if revision is None:
            raise InvariantError(f"{event} for revision {name}, which is not deployed")
        return revision

    def _settle_all(self, now: float, out: list[Action]) -> None:
        """A limit of the host moved: everybody is asked anew, in the turn they had."""
        ledger = self._ledger
        waiting = [
            *self._host.owed,
            *self._host.blocked,
            *(r for tenant in ledger.tenants.values() for r in tenant.blocked),
        ]
        for revision in waiting:
            self._queues.unblock(revision)
        for revision in dict.fromkeys((*waiting, *ledger.revisions.values())):
            self._upkeep.settle(revision, now, out)

    def deployed(self, event: Deployed, now: float) -> list[Action]:
        check_spec(event.spec)
        out: list[Action] = []
        self._ledger.add_revision(event.spec)
        self._settle_all(now, out)
        return out

    def removed(self, event: Removed, now: float) -> list[Action]:
        revision = self._revision(event.revision, "Removed")
        heir = None if event.replaced_by is None else self._revision(event.replaced_by, "Removed, replaced by")
        if heir is revision:
            raise InvariantError(f"Removed revision {event.revision} cannot be replaced by itself")
        out: list[Action] = []
        self._queues.unblock(revision)
        if heir is None:
            self._queues.reject_all(revision, RejectReason.REMOVED, None, "the revision was removed", out)
        else:
            self._queues.move_queue(revision, heir, out)
        self._ledger.retire_revision(revision)
        self._stop_present(revision, StopReason.REMOVED, out)
        self._ledger.forget_if_gone(revision)
        self._settle_all(now, out)
        return out

    def _stop_present(self, revision: Revision, reason: StopReason, out: list[Action]) -> None:
        """Stop what serves nobody, give up starts, and let the rest go when it falls idle."""
        for instance in (*revision.frozen, *revision.idle):
            self._starts.retire(instance, reason, out)
        for instance in list(revision.starting):
            self._starts.cancel(instance, reason, out)
        for instance in list(revision.busy):
            self._ledger.doom(instance, reason)

    def scaled(self, event: Scaled, now: float) -> list[Action]:
        revision = self._revision(event.revision, "Scaled")
        low = revision.min_instances if event.min_instances is None else event.min_instances
        high = revision.max_instances if event.max_instances is None else event.max_instances
        problems = [f"{n} instances are fewer than none" for n in (low, high) if n < 0]
        _refuse(f"revision {event.revision}", problems + _floor_problems(low, high))
        out: list[Action] = []
        revision.min_instances = low
        revision.max_instances = high
        self._starts.trim(revision, out)
        if revision.held:
            self._upkeep.look_at_idle(revision, now)
        self._upkeep.settle(revision, now, out)
        return out

    def recycled(self, event: Recycled, now: float) -> list[Action]:
        revision = self._revision(event.revision, "Recycled")
        out: list[Action] = []
        self._stop_present(revision, StopReason.RECYCLED, out)
        self._upkeep.settle(revision, now, out)
        return out

    def breaker_reset(self, event: BreakerReset, now: float) -> list[Action]:
        revision = self._revision(event.revision, "BreakerReset")
        out: list[Action] = []
        revision.breaker.close()
        self._upkeep.settle(revision, now, out)
        return out

    # --- the backend and the daemon -----------------------------------------------------------------------

    def backend_down(self, event: BackendDown, now: float) -> list[Action]:
        out: list[Action] = []
        self._host.backend_down = event.detail
        for revision in list(self._ledger.revisions.values()):
            self._upkeep.refuse_stranded(revision, now, out)
        return out

    def backend_up(self, event: BackendUp, now: float) -> list[Action]:
        out: list[Action] = []
        self._host.backend_down = None
        self._host.breaker.close()
        self._settle_all(now, out)
        return out

    def drained(self, event: Drained, now: float) -> list[Action]:
        ledger = self._ledger
        out: list[Action] = []
        self._host.draining = True
        self._host.keep = event.keep
        ledger.hungry.clear()
        ledger.refill.clear()
        self._host.memory_short = False
        for revision in (*ledger.revisions.values(), *ledger.retired):
            self._queues.unblock(revision)
            self._queues.reject_all(revision, RejectReason.DRAINING, DRAINING_RETRY_S, "the daemon is going down", out)
            if event.keep:
                for instance in list(revision.starting):
                    self._starts.cancel(instance, StopReason.DRAINING, out)
            else:
                self._stop_present(revision, StopReason.DRAINING, out)
            ledger.timers.disarm(revision)
        for instance in ledger.instances.values():
            ledger.timers.disarm(instance)
        ledger.timers.disarm(self._host)
        return out
