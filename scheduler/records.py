"""The records the core keeps: one per deployed revision, live instance and queued invocation. Data only."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeAlias

from scheduler.breaker import Breaker
from scheduler.history import Estimate
from scheduler.keepalive import Policy
from scheduler.model import InstanceState, RejectReason, RevisionSpec, StartKind, StopReason

UNLIMITED = 1 << 62  # stands for "no limit", so that the hot path compares two ints and nothing else


@dataclass(slots=True, eq=False, kw_only=True)
class Timed:
    """Something with at most one live entry in Timers."""

    timer_at: float = math.inf
    timer_id: int = 0  # 0: no entry


@dataclass(slots=True, eq=False, kw_only=True)
class Tenant:
    """Invocations running for one tenant, over all its functions."""

    name: str
    limit: int
    running: int = 0
    revisions: int = 0  # records that refer to it; with none left it is forgotten
    blocked: dict[Revision, None] = field(default_factory=dict)  # wait for this tenant's limit, in turn


@dataclass(slots=True, eq=False, kw_only=True)
class Function:
    """Invocations running for one function, over all its revisions, and what is kept free for it."""

    name: str
    reserved: int = 0
    running: int = 0
    revisions: dict[Revision, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False, kw_only=True)
class Revision(Timed):
    """One deployed revision: its pool, its queue, its measurements."""

    number: int
    spec: RevisionSpec
    function: Function
    tenant: Tenant
    policy: Policy
    breaker: Breaker
    slots: int
    min_instances: int
    max_instances: int
    max_uses: int
    idle_delay: float  # the shortest time after which something is due on an idle instance
    removed: bool = False
    held: bool = False  # an idle instance outlived its keep-alive because of the floor
    live: int = 0  # instances that are not stopping
    running: int = 0  # leases
    doomed_busy: int = 0  # busy instances that take no new lease
    by_state: dict[InstanceState, dict[Instance, None]]
    starting: dict[Instance, None]  # these five are the values of by_state, for speed
    idle: dict[Instance, None]  # least recently used first
    busy: dict[Instance, None]
    frozen: dict[Instance, None]  # least recently used first
    stopping: dict[Instance, None]
    partial: list[dict[Instance, None]]  # [n]: busy instances with n leases and a free slot
    partial_mask: int = 0  # bit n set: partial[n] is not empty
    queue: OrderedDict[int, Waiter] = field(default_factory=OrderedDict)  # by invocation, oldest first
    blocked_in: dict[Revision, None] | None = None  # the ring it waits in for a concurrency limit
    start_s: Estimate = field(default_factory=Estimate)
    service_s: Estimate = field(default_factory=Estimate)
    thaw_s: Estimate = field(default_factory=Estimate)
    totals: dict[StartKind, int] = field(default_factory=lambda: dict.fromkeys(StartKind, 0))
    rejections: dict[RejectReason, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Instances that exist, the stopping ones included: what max_instances bounds."""
        return self.live + len(self.stopping)

    @property
    def ready(self) -> int:
        """Instances that serve now or could."""
        return len(self.idle) + len(self.frozen) + len(self.busy) - self.doomed_busy

    @property
    def starting_slots(self) -> int:
        return len(self.starting) * self.slots

    @property
    def free_slots(self) -> int:
        free = (len(self.idle) + len(self.frozen)) * self.slots
        if self.partial_mask:
            free += sum((self.slots - n) * len(bucket) for n, bucket in enumerate(self.partial))
        return free

    @property
    def floor_missing(self) -> int:
        return self.min_instances - self.ready - len(self.starting)


@dataclass(slots=True, eq=False, kw_only=True)
class Instance(Timed):
    """One running copy of a revision, from its Start to its Stopped."""

    id: str
    number: int
    revision: Revision
    started_at: float  # when its Start was decided
    age_at: float = math.inf  # when max_age_s is reached
    state: InstanceState = InstanceState.STARTING
    ready_at: float | None = None
    ready_mark: int = 0  # number of the newest waiter when it became ready
    idle_since: float = 0.0
    granted_at: float = 0.0  # its newest lease
    leases: int = 0
    uses: int = 0  # leases granted, less those that ended unused
    served: bool = False  # a use ended, or it was adopted: it has run before
    awaited: bool = False
    doomed: StopReason | None = None  # takes no new lease; stops for this reason when its last one ends
    memory_mb: float | None = None  # the last sample
    freezable: bool = True
    freeze_not_before: float = -math.inf
    prior_failures: int = 0  # what its start wiped from the breaker; put back if it dies unused
    prior_opens: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter(Timed):
    """A queued invocation."""

    invocation: int
    number: int  # order of arrival over the whole host
    revision: Revision
    since: float
    deadline: float


@dataclass(slots=True, eq=False, kw_only=True)
class Host(Timed):
    """Counters and switches of the whole host."""

    max_concurrency: int
    memory_mb: int
    max_starts: int
    breaker: Breaker  # faults of the backend in a row, whatever the revision
    running: int = 0
    shared_max: int = 0  # invocations beyond any function's reserved capacity
    shared_running: int = 0
    memory_charged_mb: int = 0
    memory_freeing_mb: int = 0  # the part of it that stopping instances still hold
    starts_in_flight: int = 0
    draining: bool = False
    keep: bool = False
    backend_down: str | None = None
    promised_mb: int = 0  # memory being freed for starts that are waited for
    memory_short: bool = False  # somebody waits for memory that an instance falling idle could give
    blocked: dict[Revision, None] = field(default_factory=dict)  # wait for host concurrency, in turn
    owed: dict[Revision, None] = field(default_factory=dict)  # the same, but within what is reserved for them


Lease: TypeAlias = tuple[Instance, float]  # who serves, and since when
