"""The protocol of a backend: what resolves, starts, reaches, freezes, stops and finds instances.

Later backends must fit it, so nothing here names Docker.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from pool.channel import Channel
from pool.spec import Artifact, FunctionSpec, Revision


class Output(enum.IntEnum):
    """Which of an instance's streams printed something."""

    STDOUT = 1
    STDERR = 2


OnOutput = Callable[[Output, bytes], None]  # called in the trio thread; any chunking; must not block
OnProgress = Callable[[str], None]  # a line for people, called in the trio thread


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """All that is needed to start one instance."""

    instance_id: str
    revision: Revision
    env: dict[str, str]  # complete: the spec's and the contract's
    port: int  # where the code will listen (push contracts)
    on_output: OnOutput
    code_target: str = "/code"  # where a code directory appears inside


@dataclass(frozen=True, slots=True)
class Usage:
    """One sample of an instance's use."""

    memory_mb: float
    cpu_s: float


class Running(Protocol):
    """One instance as its backend holds it, from a successful start to the end of stop()."""

    @property
    def instance_id(self) -> str: ...

    @property
    def can_freeze(self) -> bool:
        """False where the host offers no way to freeze."""

    @property
    def pid(self) -> int | None:
        """The first process, on the host, where there is one."""

    @property
    def exited(self) -> str | None:
        """None while it runs; else how it ended, for people: "exit code 3", "killed by signal 9", "out of memory"."""

    async def dial(self, port: int) -> Channel:
        """Connect to 127.0.0.1:port inside the instance (or its bridge address). One attempt.

        Raises ChannelClosed when nothing listens, BackendUnavailable when the instance cannot be reached at all.
        """

    async def listen(self, port: int) -> trio.SocketListener:
        """Listen on 127.0.0.1:port inside the instance, for contracts in which the code pulls.

        Raises BackendUnavailable where the namespace cannot be entered, OSError when the port is taken.
        """

    async def freeze(self) -> None:
        """Stop all its processes from running, keeping their memory. Raises OSError or BackendUnavailable."""

    async def thaw(self) -> None:
        """Undo freeze(); returns when the processes may run again. No checkpoint on the fast path."""

    async def sample(self) -> Usage: ...

    async def stop(self, grace_s: float) -> None:
        """End it: thaw, ask, after grace_s kill, remove everything it left. Idempotent; works on what has exited.

        Runs shielded by its caller: when it returns nothing of the instance is left. Raises BackendUnavailable
        when the engine cannot be asked; recovery then removes it later.
        """


@dataclass(frozen=True, slots=True)
class InstanceExited:
    """An instance ended by itself (or with its engine)."""

    instance_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class BackendLost:
    """The engine stopped answering."""

    detail: str


@dataclass(frozen=True, slots=True)
class BackendBack:
    """The engine answers again; what was lost meanwhile has been reported by InstanceExited before this."""


BackendEvent = InstanceExited | BackendLost | BackendBack


@dataclass(frozen=True, slots=True)
class Found:
    """An instance of this daemon's that an earlier run left."""

    instance_id: str
    revision_id: str
    running: bool
    frozen: bool
    age_s: float


class Backend(Protocol):
    """One way of running instances.

    Used as: `async with backend: ...`; entering checks that the backend can work at all (raises
    BackendUnavailable with what to do), leaving releases what it holds but stops no instance.
    """

    @property
    def name(self) -> str: ...

    @property
    def isolation(self) -> str:
        """One line for people: what separates instances here."""

    async def __aenter__(self) -> Backend: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def describe(self) -> dict[str, str]:
        """Version and abilities, for `status`."""

    async def resolve(self, spec: FunctionSpec, code_path: str | None, on_progress: OnProgress) -> Artifact:
        """Find or fetch what the spec runs: pulls the image when it is not there, checks the bootstrap.

        `code_path` is the unpacked code directory of a code function. Raises ArtifactError, BackendUnavailable.
        """

    async def start(self, request: StartRequest) -> Running:
        """Create and start one instance; returns when its first process runs (not when it listens).

        Raises StartError, BackendUnavailable. When it raises, or is cancelled, it leaves nothing behind.
        """

    def events(self) -> AsyncGenerator[BackendEvent, None]:
        """Everything that happens without being asked for, from now on. One consumer. Ends only by cancellation.
        Use it with contextlib.aclosing.

        An exit caused by stop() may or may not be reported.
        """

    async def find(self) -> list[Found]:
        """Every instance of this daemon's that exists and was not started by this object."""

    async def adopt(self, found: Found, revision: Revision, on_output: OnOutput) -> Running:
        """Take over a found, running instance; it comes back thawed. Raises StartError when that fails."""

    async def remove(self, found: Found) -> None:
        """Remove a found instance and all it left."""

    async def cleanup(self) -> None:
        """Remove what outlives instances (a network of our own), once the last has ended. Failures are only logged."""
