"""What the native API answers: one type for each shape. The OpenAPI document is made from these."""

from __future__ import annotations

from typing import Literal

import msgspec

from pool.spec import FunctionSpec
from scheduler.model import InstanceState, StopReason

State = Literal["ready", "starting", "empty", "failing", "removing"]  # empty: an invocation starts an instance


class CodeStored(msgspec.Struct):
    """An uploaded code directory; deploy with ?code=DIGEST."""

    digest: str


class ScaleRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A new floor and ceiling; what is left out stays."""

    min: int | None = None
    max: int | None = None


class Done(msgspec.Struct, omit_defaults=True):
    """A request was carried out."""

    ok: bool = True
    name: str = ""
    message: str = ""


class Checked(msgspec.Struct):
    """Valid specs, by the names of their functions."""

    functions: list[str]
    ok: bool = True


class Deployed(msgspec.Struct, kw_only=True):
    """A deployment that succeeded. `unchanged`: this very revision was deployed already."""

    name: str
    revision: str
    digest: str
    outcome: Literal["created", "updated", "unchanged"]
    ready: bool = True  # false: its floor is not (all) started yet
    stages_s: dict[str, float] = {}  # seconds by step


class Progress(msgspec.Struct):
    """One line of a deployment's course."""

    progress: str


class Finished(msgspec.Struct):
    """The last line of a deployment's course, when it went well; else the error shape is."""

    result: Deployed


class InstanceCounts(msgspec.Struct):
    """A function's instances by state."""

    starting: int = 0
    idle: int = 0
    busy: int = 0
    frozen: int = 0
    stopping: int = 0


class StartTotals(msgspec.Struct):
    """Invocations by start kind since the daemon started."""

    warm: int = 0
    thawed: int = 0
    prewarmed: int = 0
    cold: int = 0


class Breaker(msgspec.Struct, omit_defaults=True):
    """A revision whose starts keep failing is not started again until `retry_after_s` have passed."""

    open: bool = False
    failures: int = 0
    retry_after_s: float | None = None
    detail: str = ""


class InstanceInfo(msgspec.Struct, kw_only=True):
    """One instance. `idle_s` null: in use; `memory_mb` null: not measured yet."""

    id: str
    function: str
    revision: str
    state: InstanceState
    slots: int
    used: int
    uses: int
    age_s: float
    idle_s: float | None = None
    pid: int | None = None
    memory_mb: float | None = None
    stopping_because: StopReason | None = None


class InstanceList(msgspec.Struct):
    """Instances, by function and age."""

    instances: list[InstanceInfo]


class FunctionRow(msgspec.Struct, kw_only=True):
    """One function in short."""

    name: str
    state: State
    revision: str
    contract: str
    runs: str  # the image or code it runs
    min: int
    max: int
    instances: InstanceCounts
    queued: int
    running: int
    totals: StartTotals
    errors: int
    rejected: int
    problem: str | None = None  # why it cannot start since poold did


class FunctionList(msgspec.Struct):
    """Deployed functions by name."""

    functions: list[FunctionRow]


class FunctionInfo(FunctionRow, kw_only=True):
    """Everything about one function. `estimates`: what the scheduler expects, in seconds."""

    digest: str
    deployed_at: str  # ISO 8601, UTC
    description: str
    spec: FunctionSpec
    breaker: Breaker
    estimates: dict[str, float | None]
    rejected_by_reason: dict[str, int]
    instance_list: list[InstanceInfo]


class LogEntry(msgspec.Struct, kw_only=True):
    """One line that an instance printed; `dropped` > 0: so many before it were lost to a slow reader."""

    at: str  # ISO 8601, UTC
    instance: str
    invocation: str
    stream: Literal["stdout", "stderr"]
    text: str
    dropped: int = 0


class MemoryInfo(msgspec.Struct):
    """The memory budget and what is charged against it."""

    charged_mb: int
    limit_mb: int


class OpenBreaker(msgspec.Struct, kw_only=True):
    """A function that is kept from starting."""

    function: str
    revision: str
    failures: int
    retry_after_s: float | None
    detail: str


class Status(msgspec.Struct, kw_only=True):
    """The daemon's present state."""

    version: str
    backend: str
    isolation: str
    backend_reason: str  # why it is this backend
    engine: dict[str, str]  # the backend's version and abilities
    engine_problem: str | None  # why it does not answer; null while it does
    listen: list[str]  # the addresses that take requests
    pid: int
    uptime_s: float
    draining: bool
    functions: int
    instances: InstanceCounts
    memory: MemoryInfo
    running: int  # invocations that hold a slot
    max_concurrency: int
    queued: int
    starts_in_flight: int
    max_starts: int
    totals: StartTotals
    errors: int
    rejected: int
    breakers: list[OpenBreaker]
    warnings: list[str]


class Health(msgspec.Struct):
    """The daemon answers. `status` is draining while it goes down."""

    status: Literal["ok", "draining"]
