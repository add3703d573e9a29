"""What the core is told (events) and what it asks for (actions). Every outside fact is one, every effect is one."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model import RejectReason, RevisionSpec, StartKind, StopReason

# --- events -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Deployed:
    """A revision exists from now on. Known already: an InvariantError."""

    spec: RevisionSpec


@dataclass(slots=True)
class Removed:
    """A revision takes no more invocations; its queue is rejected unless `replaced_by` takes it over, its
    idle instances stop, its busy ones stop when they fall idle."""

    revision: str
    replaced_by: str | None = None


@dataclass(slots=True)
class Scaled:
    """New floor and ceiling of a revision (None: unchanged)."""

    revision: str
    min_instances: int | None = None
    max_instances: int | None = None


@dataclass(slots=True)
class Recycled:
    """Stop every instance of the revision that exists now; busy ones when they fall idle."""

    revision: str


@dataclass(slots=True)
class Invoked:
    """An invocation asks for a slot before `deadline` (same clock as now)."""

    invocation: int
    revision: str
    deadline: float


@dataclass(slots=True)
class Abandoned:
    """The caller of a queued invocation has gone."""

    invocation: int


@dataclass(slots=True)
class Released:
    """A granted invocation is over. `healthy` False: the instance must not serve again. `used` False: nothing
    was sent to it, so it does not count as a use."""

    invocation: int
    healthy: bool = True
    used: bool = True


@dataclass(slots=True)
class Started:
    """An instance is prepared (started, connected, initialised)."""

    instance: str


@dataclass(slots=True)
class StartFailed:
    """A start failed, and whatever it left is cleaned up. `backend_fault` True: the engine's fault, which does
    not count against the revision. `permanent` True: trying again cannot help (image or bootstrap missing)."""

    instance: str
    detail: str
    backend_fault: bool = False
    permanent: bool = False


@dataclass(slots=True)
class Stopped:
    """An instance is gone and its memory is free."""

    instance: str


@dataclass(slots=True)
class Died:
    """An instance exited by itself, or was lost with its engine. Its clean-up is asked for by a Stop."""

    instance: str
    detail: str = ""


@dataclass(slots=True)
class Frozen:
    """A Freeze was carried out."""

    instance: str


@dataclass(slots=True)
class FreezeFailed:
    """A Freeze could not be carried out; the instance runs. `permanent`: do not freeze this one again."""

    instance: str
    permanent: bool = True


@dataclass(slots=True)
class Thawed:
    """A thaw asked for by a Grant was carried out, in this many seconds."""

    instance: str
    took_s: float


@dataclass(slots=True)
class Sampled:
    """An instance's memory as measured."""

    instance: str
    memory_mb: float


@dataclass(slots=True)
class Adopted:
    """A healthy, running instance of an earlier daemon was found (idle, not frozen). Its uses are unknown:
    it counts as having run before."""

    instance: str
    revision: str
    age_s: float = 0.0


@dataclass(slots=True)
class BackendDown:
    """The engine does not answer: no Start until BackendUp."""

    detail: str


@dataclass(slots=True)
class BackendUp:
    """The engine answers again."""


@dataclass(slots=True)
class BreakerReset:
    """A user closes a revision's breaker by hand."""

    revision: str


@dataclass(slots=True)
class Drained:
    """The daemon goes down: refuse what is new, let what runs end, stop the rest. With `keep` idle instances
    stay, to be adopted by the next daemon."""

    keep: bool = False


@dataclass(slots=True)
class Ticked:
    """Time passed; sent at next_deadline()."""


Event = (
    Deployed | Removed | Scaled | Recycled | Invoked | Abandoned | Released | Started | StartFailed | Stopped | Died
    | Frozen | FreezeFailed | Thawed | Sampled | Adopted | BackendDown | BackendUp | BreakerReset | Drained | Ticked
)  # fmt: skip

# --- actions ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Grant:
    """The invocation holds a slot of the instance. `thaw`: the instance is frozen, thaw it first."""

    invocation: int
    instance: str
    start_kind: StartKind
    thaw: bool


@dataclass(slots=True)
class Reject:
    """The invocation is refused. `retry_after_s`: when trying again could help; None: it cannot."""

    invocation: int
    reason: RejectReason
    retry_after_s: float | None = None
    detail: str = ""


@dataclass(slots=True)
class Start:
    """Start an instance of the revision. `awaited`: somebody waits for it."""

    instance: str
    revision: str
    awaited: bool


@dataclass(slots=True)
class Stop:
    """Stop the instance (thaw it first when it is frozen) and clean up after it; answer with Stopped."""

    instance: str
    reason: StopReason


@dataclass(slots=True)
class Freeze:
    """Freeze the idle instance; answer with Frozen or FreezeFailed. A Grant may overtake it."""

    instance: str


@dataclass(slots=True)
class CancelStart:
    """The start is no longer wanted (removed, draining): give it up, clean up, answer with Stopped. A start
    that had just succeeded is stopped like any other."""

    instance: str
    reason: StopReason


Action = Grant | Reject | Start | Stop | Freeze | CancelStart
