"""What a poold has on this host: processes and cgroups, found without asking it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pool import cgroups


def processes_of(directory: Path) -> list[tuple[int, str]]:
    """Processes that have a directory in their command line or among their mounts."""
    marker = str(directory).encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if command and (marker in command or marker in (entry / "mountinfo").read_bytes()):
                found.append((int(entry.name), command.replace(b"\0", b" ").decode(errors="replace")[:200]))
    return found


def instance_cgroups(daemon_id: str) -> list[Path]:
    """The cgroups of a daemon's processes."""
    own = cgroups.membership()
    found: list[Path] = []
    for hierarchy in cgroups.hierarchies():
        path = cgroups.path_in(hierarchy, own)
        where = hierarchy.directory(path) if path is not None else None
        if where is not None:
            found += where.glob(f"poold:{daemon_id}:*")
    return found
