"""The functions that are measured: the built-in one, or a user's own by its spec."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench import function_server
from gateway.specfile import SpecError, parse_specs
from pool.spec import FunctionSpec, PoolSpec, QueueSpec

SPEC_NAMES = ("function.yaml", "function.yml", "function.json")
PORT = 9000


class BadWorkload(Exception):
    """What was named cannot be measured; says why."""


@dataclass(frozen=True, slots=True)
class Ask:
    """How a function is asked: through poold, and directly."""

    method: str
    path: str  # below poold's /fn/NAME, or the function's own
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    event: bool = False  # through poold by `invoke`

    def poold_path(self, name: str) -> str:
        """The path to ask poold for."""
        return f"/v1/functions/{name}/invoke" if self.event else f"/fn/{name}{self.path}"


@dataclass(frozen=True, slots=True)
class Workload:
    """A function to measure: its spec, and the directory that its relative paths start from."""

    spec: FunctionSpec
    base: Path
    ask: Ask

    @property
    def code(self) -> Path | None:
        """The code directory, where it has one."""
        return self.base / self.spec.code if self.spec.code is not None else None

    def variant(self, suffix: str, pool: PoolSpec, **changes: object) -> FunctionSpec:
        """The same function under another name, with another pool."""
        name = f"{self.spec.name[:40]}-{suffix}"
        return msgspec.structs.replace(self.spec, name=name, pool=pool, **changes)


def builtin(directory: Path) -> Workload:
    """The built-in function, its code written below `directory`: the standard library's fastest fixed answer."""
    code = directory / "builtin"
    code.mkdir(exist_ok=True)
    bootstrap = code / "bootstrap"
    shutil.copyfile(function_server.__file__, bootstrap)
    bootstrap.chmod(0o755)
    code.chmod(0o755)
    spec = FunctionSpec(
        name="bench", code="builtin", contract="web", port=PORT, network="none", memory_mb=32, queue=QueueSpec(max=1000)
    )
    return Workload(spec, directory, Ask("GET", "/"))


def load(path: Path, *, method: str | None = None, target: str = "/", body: bytes | None = None) -> Workload:
    """A spec file, or a directory with a function.yaml. Raises BadWorkload."""
    file = path
    if path.is_dir():
        found = [path / name for name in SPEC_NAMES if (path / name).is_file()]
        if not found:
            raise BadWorkload(f"there is no {SPEC_NAMES[0]} in {path}: name the spec's file itself")
        file = found[0]
    try:
        specs = parse_specs(file.read_text("utf-8"), str(file))
    except SpecError as exc:
        raise BadWorkload("\n".join(str(problem) for problem in exc.problems)) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise BadWorkload(f"{file} cannot be read: {exc}") from None
    if len(specs) != 1:
        raise BadWorkload(f"{file} describes {len(specs)} functions: one is measured at a time")
    return Workload(specs[0], file.parent, _ask(specs[0], method, target, body))


def _ask(spec: FunctionSpec, method: str | None, target: str, body: bytes | None) -> Ask:
    if spec.contract == "fc" and spec.fc.type == "event":
        headers = (
            ("Content-Type", "application/octet-stream"),
            ("x-fc-control-path", "/invoke"),
            ("x-fc-function-name", spec.name),
            ("x-fc-request-id", "poolbench"),
        )
        return Ask("POST", "/invoke", b"{}" if body is None else body, headers, event=True)
    return Ask(method or ("POST" if body else "GET"), target, body or b"")
