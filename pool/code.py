"""A code directory: whether it can run, what starts it, and what identifies its content."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pool.errors import ArtifactError
from pool.spec import FunctionSpec

BOOTSTRAP = "bootstrap"
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CodeFacts:
    """What a code directory came to. `digest` covers paths, permissions, link targets and bytes."""

    digest: str
    size_mb: int


def code_command(spec: FunctionSpec, code_target: str) -> list[str]:
    """The command of a code function: the spec's own, else the directory's bootstrap."""
    own = [*(spec.entrypoint or ()), *(spec.command or ())]
    return own or [f"{code_target}/{BOOTSTRAP}"]


def check_code(spec: FunctionSpec, code_path: str, *, as_other: bool) -> None:
    """Check that a code directory can be run. Raises ArtifactError, saying what to change.

    `as_other`: it runs under a user that neither owns it nor is in its group. Quick: two stats.
    """
    root = Path(code_path)
    try:
        root_stat = root.stat()
    except OSError as exc:
        raise ArtifactError(
            f"{spec.name}: the code directory {root} cannot be read: {exc.strerror}",
            hint="name an existing directory in `code`",
        ) from exc
    if not stat.S_ISDIR(root_stat.st_mode):
        raise ArtifactError(
            f"{spec.name}: {root} is not a directory", hint="`code` names a directory that holds the bootstrap"
        )
    if as_other and root_stat.st_mode & 0o005 != 0o005:
        raise ArtifactError(
            f"{spec.name}: the code directory {root} has mode {stat.S_IMODE(root_stat.st_mode):04o}, "
            "so the function's user cannot read it",
            hint=f"chmod 755 {root}",
        )
    if not (spec.entrypoint or spec.command):
        _check_bootstrap(spec, root / BOOTSTRAP, as_other=as_other)


def _check_bootstrap(spec: FunctionSpec, bootstrap: Path, *, as_other: bool) -> None:
    try:
        found = bootstrap.stat()
    except FileNotFoundError as exc:
        raise ArtifactError(
            f"{spec.name}: there is no file {BOOTSTRAP} in {bootstrap.parent}",
            hint="a code function starts with an executable file named bootstrap (or name a command in the spec)",
        ) from exc
    except OSError as exc:
        raise ArtifactError(f"{spec.name}: {bootstrap} cannot be read: {exc.strerror}") from exc
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{spec.name}: {bootstrap} is not a regular file", hint="it must be a program or a script")
    needed = 0o005 if as_other else 0o100
    if found.st_mode & needed != needed:
        raise ArtifactError(
            f"{spec.name}: {bootstrap} is not executable for the function's user: "
            f"its mode is {stat.S_IMODE(found.st_mode):04o}",
            hint="chmod 755 bootstrap",
        )
    if found.st_size == 0:
        raise ArtifactError(f"{spec.name}: {bootstrap} is empty", hint="it must be a program or a script")


def code_facts(code_path: str) -> CodeFacts:
    """Read the whole directory; call it in a thread. Raises ArtifactError when something in it cannot be read."""
    root = Path(code_path)
    total_bytes = 0
    digest = hashlib.sha256()
    try:
        for path in sorted(root.rglob("*")):
            facts = path.lstat()
            kind = stat.S_IFMT(facts.st_mode)
            digest.update(f"{path.relative_to(root)}\0{facts.st_mode:o}\0".encode("utf-8", "surrogateescape"))
            if kind == stat.S_IFLNK:
                digest.update(os.fsencode(path.readlink()) + b"\0")
            elif kind == stat.S_IFREG:
                total_bytes += facts.st_size
                digest.update(f"{facts.st_size}\0".encode())
                with path.open("rb") as file:
                    while block := file.read(READ_BYTES):
                        digest.update(block)
            elif kind != stat.S_IFDIR:
                raise ArtifactError(
                    f"{path} is neither a file, a directory nor a link", hint="remove it from the code directory"
                )
    except OSError as exc:
        raise ArtifactError(f"the code cannot be read: {exc}") from exc
    return CodeFacts(f"sha256:{digest.hexdigest()}", total_bytes // (1024 * 1024))
