"""The core's vocabulary: states, start kinds, limits. Data only."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class StartKind(enum.StrEnum):
    """How an invocation came by its instance; on every reply, metric, log line and bench row."""

    WARM = "warm"  # ran before, was running
    THAWED = "thawed"  # ran before, was frozen
    PREWARMED = "prewarmed"  # started ahead of need, first use; frozen or not
    COLD = "cold"  # a start was waited for


class InstanceState(enum.StrEnum):
    """The states a backend really has. Transitions stand in lifecycle.py."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    FROZEN = "frozen"
    STOPPING = "stopping"
    DEAD = "dead"


class RejectReason(enum.StrEnum):
    """Why an invocation was refused."""

    UNKNOWN_REVISION = "unknown_revision"
    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"  # its time in the queue ran out
    WOULD_MISS_DEADLINE = "would_miss_deadline"  # refused at once: queue + start would take longer than it has
    CONCURRENCY_LIMIT = "concurrency_limit"  # nothing may be queued (queue of 0) and a limit holds
    NO_CAPACITY = "no_capacity"  # one instance alone is larger than the memory budget
    START_FAILED = "start_failed"  # the start it waited for failed; detail says why
    CRASH_LOOP = "crash_loop"  # the revision's breaker is open
    BACKEND_DOWN = "backend_down"  # the engine does not answer and no running instance is free
    REMOVED = "removed"  # the revision was removed while it waited
    DRAINING = "draining"  # the daemon is going down


class StopReason(enum.StrEnum):
    """Why an instance is stopped."""

    EXPIRED = "expired"  # keep-alive ran out
    EVICTED = "evicted"  # its memory was needed
    SURPLUS = "surplus"  # above max, or above what scale asks for
    AGED = "aged"  # max_age_s reached
    USED_UP = "used_up"  # max_uses reached
    MEMORY_GROWTH = "memory_growth"
    BROKEN = "broken"  # cut in mid-request, or answered garbage
    DIED = "died"  # exited by itself; the stop only cleans up
    REMOVED = "removed"  # its revision was removed or replaced
    RECYCLED = "recycled"  # a user asked
    DRAINING = "draining"  # the daemon is going down


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionSpec:
    """What the core needs to know of one revision. Immutable; Scaled changes min and max beside it."""

    revision: str
    function: str
    tenant: str = "default"
    slots: int = 1  # invocations at a time in one instance
    min_instances: int = 0  # the floor: kept started whatever happens
    max_instances: int = 10
    memory_mb: int = 256  # charged for each instance from its Start to its Stopped
    reserved: int = 0  # invocations at a time that the host keeps free for this function
    queue_max: int = 100
    keepalive: str = "ttl"  # a name in keepalive.REGISTRY
    keepalive_s: float = 600.0
    freeze_after_s: float | None = 1.0  # idle this long, then frozen; 0 at once; None never
    max_age_s: float | None = None
    max_uses: int | None = None
    max_memory_mb: int | None = None  # recycled when a sample shows more than this


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLimits:
    """Limits of the whole host."""

    memory_mb: int = 4096
    max_concurrency: int = 1000  # invocations running at a time, over all functions
    tenant_concurrency: int | None = None  # the same per tenant; None = no limit of its own
    tenant_overrides: dict[str, int] = field(default_factory=dict)
    max_starts: int = 2  # starts in flight; about the number of cores
    breaker_failures: int = 3  # failures in a row that open a revision's breaker
    breaker_base_s: float = 1.0  # first back-off; doubles
    breaker_max_s: float = 300.0
    journal_entries: int = 10_000
