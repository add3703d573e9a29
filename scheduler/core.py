"""The scheduler: one call turns an event into actions. It reads no clock, does no I/O and never waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from scheduler import stats
from scheduler.admission import Admission
from scheduler.deployments import Deployments, check_limits
from scheduler.errors import InvariantError
from scheduler.granting import Granting
from scheduler.ledger import Ledger
from scheduler.messages import (
    Abandoned,
    Action,
    Adopted,
    BackendDown,
    BackendUp,
    BreakerReset,
    Deployed,
    Died,
    Drained,
    Event,
    FreezeFailed,
    Frozen,
    Invoked,
    Recycled,
    Released,
    Removed,
    Sampled,
    Scaled,
    Started,
    StartFailed,
    Stopped,
    Thawed,
    Ticked,
)
from scheduler.model import HostLimits
from scheduler.queues import Queues
from scheduler.recording import Journal
from scheduler.serving import Serving
from scheduler.snapshot import capture
from scheduler.starts import Starts
from scheduler.stats import HostStats, InstanceView, RevisionStats
from scheduler.upkeep import Upkeep


class Rng(Protocol):
    """Where chance comes from: back-offs are spread by it."""

    def random(self) -> float:
        """A number in [0, 1)."""


class Scheduler:
    """Decides for one host. One caller at a time; `now` never runs backwards.

    State changes at the decision: a Grant's slot is taken, a Start's memory charged, a Stop's stays charged
    until Stopped. `epoch` makes instance ids unique across daemons: they are f"{epoch}-{n:x}".

    An event object belongs to the core from handle() on: the journal keeps it, so it must not be changed."""

    def __init__(self, limits: HostLimits, *, epoch: str, rng: Rng) -> None:
        """Raises ConfigurationError for limits that cannot be."""
        check_limits(limits)
        self.limits = limits
        self.epoch = epoch
        self._rng = rng
        self._now = 0.0
        self._ledger = ledger = Ledger(limits, epoch)
        self.journal = Journal(limits.journal_entries, lambda: capture(ledger))
        admission = Admission(ledger)
        starts = Starts(ledger, admission)
        granting = Granting(ledger)
        queues = Queues(ledger, admission, granting)
        serving = Serving(ledger, admission, starts, granting, queues)
        upkeep = Upkeep(ledger, admission, starts, queues, serving, self._draw)
        deployments = Deployments(ledger, starts, queues, upkeep)
        self._record = self.journal.record
        self._dispatch: dict[type[Any], Callable[[Any, float], list[Action]]] = {
            Invoked: serving.invoked,
            Released: serving.released,
            Abandoned: serving.abandoned,
            Started: upkeep.started,
            StartFailed: upkeep.start_failed,
            Stopped: upkeep.stopped,
            Died: upkeep.died,
            Frozen: upkeep.frozen,
            FreezeFailed: upkeep.freeze_failed,
            Thawed: upkeep.thawed,
            Sampled: upkeep.sampled,
            Adopted: upkeep.adopted,
            Ticked: upkeep.ticked,
            Deployed: deployments.deployed,
            Removed: deployments.removed,
            Scaled: deployments.scaled,
            Recycled: deployments.recycled,
            BreakerReset: deployments.breaker_reset,
            BackendDown: deployments.backend_down,
            BackendUp: deployments.backend_up,
            Drained: deployments.drained,
        }
        self.next_deadline: Callable[[], float] = ledger.timers.next_at
        """When the next Ticked is wanted, on the clock of now; inf: not at all. Cheap: call it after each
        handle(). It may come early: then the Ticked does nothing but look."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """What is to be done about `event`, in that order.

        Raises InvariantError for an event that the present state does not allow and ConfigurationError for a
        Deployed or Scaled that cannot be; in both cases nothing has changed."""
        try:
            decide = self._dispatch[type(event)]
        except KeyError:
            raise InvariantError(f"{type(event).__name__} is no event of the core") from None
        self._now = now
        self._record(now, event)
        return decide(event, now)

    def _draw(self) -> float:
        value = self._rng.random()
        self.journal.drew(value)
        return value

    def restore(self, fill: Callable[[Ledger], None]) -> None:
        """Begin in another state than the empty one: `fill` puts it into the ledger. Only before the first
        event; the journal begins there."""
        if self._ledger.revision_count or len(self.journal):
            raise InvariantError("only a new scheduler can be given a state")
        fill(self._ledger)
        self.journal.restart()

    # --- views --------------------------------------------------------------------------------------------

    def revisions(self) -> list[str]:
        """The deployed revisions, in the order they came."""
        return list(self._ledger.revisions)

    def revision_stats(self, revision: str) -> RevisionStats:
        """Raises KeyError when it is not deployed."""
        return stats.revision_stats(self._ledger.revisions[revision], self._now)

    def retired_stats(self) -> list[RevisionStats]:
        """Removed revisions of which instances or invocations are left."""
        return [stats.revision_stats(revision, self._now) for revision in self._ledger.retired]

    def instance_view(self, instance: str) -> InstanceView:
        """Raises KeyError when there is none of that id."""
        return stats.instance_view(self._ledger.instances[instance])

    def instances(self, revision: str | None = None) -> list[InstanceView]:
        """All instances, or those of one revision, removed ones of that name included; oldest first."""
        known = self._ledger.instances.values()
        if revision is None:
            return [stats.instance_view(each) for each in known]
        return [stats.instance_view(each) for each in known if each.revision.spec.revision == revision]

    def host_stats(self) -> HostStats:
        return stats.host_stats(self._ledger)
