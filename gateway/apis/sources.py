"""What the management routes need of the rest of the daemon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from pool.contracts.base import BodySource
from pool.instance import Instance
from pool.logbook import Follower
from pool.logs import LogLine
from pool.spec import FunctionSpec, Revision
from scheduler.stats import HostStats, InstanceView, RevisionStats


class DeployResult(Protocol):
    """A deployment that succeeded."""

    @property
    def revision(self) -> Revision: ...

    @property
    def outcome(self) -> Literal["created", "updated", "unchanged"]: ...

    @property
    def ready(self) -> bool: ...

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by step."""


class DeployedFunction(Protocol):
    """A function as the registry holds it."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> FunctionSpec: ...

    @property
    def revision(self) -> Revision: ...

    @property
    def deployed_at_s(self) -> float:
        """Seconds since the epoch."""

    @property
    def problem(self) -> str | None:
        """Why it cannot start; None: nothing known."""


class Registry(Protocol):
    """Deployed functions. Methods that change one raise KeyError for an unknown name, and PoolError."""

    async def deploy(
        self,
        spec: FunctionSpec,
        *,
        code_digest: str | None = None,
        wait: bool = True,
        on_progress: Callable[[str], None] | None = None,
    ) -> DeployResult: ...

    async def remove(self, name: str) -> None: ...

    async def scale(self, name: str, min_instances: int | None, max_instances: int | None) -> None: ...

    def recycle(self, name: str) -> None: ...

    def get(self, name: str) -> DeployedFunction | None: ...

    def list(self) -> Sequence[DeployedFunction]: ...


class CodeStore(Protocol):
    """Unpacked code directories by digest."""

    async def add_tar(self, source: BodySource, limit_bytes: int) -> str:
        """Store a tar's content; returns its digest. Raises ArtifactError."""


class Pools(Protocol):
    """The dispatcher, as far as it is looked at and steered from here."""

    def stats(self, revision_id: str) -> RevisionStats:
        """Raises KeyError."""

    def host_stats(self) -> HostStats: ...

    def instances(self, revision_id: str | None = None) -> Sequence[InstanceView]: ...

    def find_instance(self, instance_id: str) -> Instance | None: ...

    def reset_breaker(self, revision_id: str) -> None: ...

    async def journal(self) -> bytes: ...


class Logs(Protocol):
    """The log book."""

    def tail(
        self, function: str, limit: int, *, instance: str | None = None, invocation: str | None = None
    ) -> list[LogLine]: ...

    def subscribe(self, function: str) -> AbstractContextManager[Follower]: ...


class Daemon(Protocol):
    """The running daemon's own state."""

    @property
    def backend_name(self) -> str: ...

    @property
    def backend_reason(self) -> str:
        """Why it is this backend."""

    @property
    def isolation(self) -> str: ...

    @property
    def engine(self) -> dict[str, str]:
        """The backend's own description, as last heard."""

    @property
    def engine_problem(self) -> str | None:
        """Why the engine does not answer; None while it does."""

    @property
    def listen(self) -> Sequence[str]:
        """The addresses that take requests."""

    @property
    def uptime_s(self) -> float: ...

    @property
    def draining(self) -> bool: ...

    def warnings(self) -> Sequence[str]:
        """What its user should know: no isolation, no freezing, a configuration that could not be reloaded."""

    def drain(self) -> None:
        """Begin to refuse what is new and end what runs. Returns at once."""
