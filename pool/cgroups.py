"""Where cgroups are: the hierarchies of this host, v1 and v2, and which directory a process is in.

From cgroups(7) and proc(5): /proc/PID/cgroup names a path in each hierarchy, /proc/self/mountinfo where each
hierarchy is mounted and which part of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

V1_CONTROLLERS = frozenset({"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "hugetlb"})


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy. `controllers` is empty for v2, whose controllers differ from directory to directory."""

    version: int
    mount: Path
    root: str  # the path, in the hierarchy, of what is mounted there
    controllers: frozenset[str]

    def directory(self, path: str) -> Path | None:
        """The directory of the cgroup `path`; None when it lies outside of what is mounted."""
        if ".." in path.split("/"):  # outside of our cgroup namespace
            return None
        if self.root != "/":
            if path != self.root and not path.startswith(self.root + "/"):
                return None
            path = path[len(self.root) :]
        return self.mount / path.strip("/")


def hierarchies(mountinfo: str | None = None) -> list[Hierarchy]:
    """Every mounted hierarchy with controllers, and v2. `mountinfo`: the text to read, else this process's own."""
    found: list[Hierarchy] = []
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        kind, *rest = after.split(" ")
        if kind not in ("cgroup", "cgroup2"):
            continue
        fields = before.split(" ")
        root, mount = _unescape(fields[3]), Path(_unescape(fields[4]))
        if kind == "cgroup2":
            found.append(Hierarchy(2, mount, root, frozenset()))
        elif controllers := V1_CONTROLLERS & set(rest[-1].split(",")):
            found.append(Hierarchy(1, mount, root, controllers))
    return found


def membership(pid: int | str = "self") -> list[tuple[frozenset[str], str]]:
    """The cgroups of a process: (v1 controllers, path), no controllers meaning v2. Raises OSError."""
    found: list[tuple[frozenset[str], str]] = []
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        controllers = V1_CONTROLLERS & set(names.split(","))
        if controllers or (number == "0" and not names):
            found.append((controllers, path))
    return found


def path_in(hierarchy: Hierarchy, member_of: list[tuple[frozenset[str], str]]) -> str | None:
    """The path that `member_of` (see membership) gives for `hierarchy`."""
    for controllers, path in member_of:
        if controllers == hierarchy.controllers or (controllers & hierarchy.controllers):
            return path
    return None


def write(path: Path, text: str) -> None:
    """One write to a kernel file. Raises OSError, which the kernel gives at the write, not at the open."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _unescape(field: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
