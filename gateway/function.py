"""A deployed function, and what came of deploying one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gateway.store import DamagedFunction, StoredFunction
from pool.spec import Artifact, FunctionSpec, Revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A deployed function. `deployed_at_s`: seconds since the epoch; `generation` counts its deployments.

    `problem`: why it cannot start since poold did (its image is gone, say); None: nothing known."""

    name: str
    spec: FunctionSpec
    revision: Revision
    code_digest: str | None
    deployed_at_s: float
    generation: int
    problem: str | None = None

    def stored(self) -> StoredFunction:
        """What the store keeps of it."""
        return StoredFunction(
            name=self.name,
            spec=self.spec,
            artifact=self.revision.artifact,
            revision=self.revision.id,
            code_digest=self.code_digest,
            deployed_at_s=self.deployed_at_s,
            generation=self.generation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployResult:
    """A deployment that succeeded. `stages`: seconds by step. `ready` False: its floor is not (all) started yet."""

    function: Function
    outcome: Literal["created", "updated", "unchanged"]
    ready: bool
    stages: dict[str, float]

    @property
    def revision(self) -> Revision:
        """The revision that answers now."""
        return self.function.revision

    @property
    def changed(self) -> bool:
        """False when this very revision was deployed already."""
        return self.outcome != "unchanged"


def unreadable(record: DamagedFunction) -> Function:
    """Stands for a function whose record cannot be read, so that it can be seen and removed."""
    spec = FunctionSpec(name=record.name, description="(unreadable)")
    revision = Revision(id=f"{record.name}@unreadable", spec=spec, artifact=Artifact(digest=""))
    return Function(
        name=record.name,
        spec=spec,
        revision=revision,
        code_digest=record.code_digest,
        deployed_at_s=0.0,
        generation=0,
        problem=f"{record.problem}; deploy it again",
    )


def broken(function: Function, problem: str) -> Function:
    """The same for a function whose record can be read, but not carried out."""
    stand_in = unreadable(DamagedFunction(name=function.name, problem=problem, code_digest=function.code_digest))
    return replace(stand_in, deployed_at_s=function.deployed_at_s, generation=function.generation)
