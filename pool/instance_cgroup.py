"""A cgroup of its own for each instance of the process backend: limits, use, freezing, and killing without a rest.

On v1 an instance has one directory in each of the hierarchies that are needed and writable, on v2 one directory, on
a hybrid host some of both. They lie below the daemon's own cgroup, so what limits the daemon limits them too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import trio

from pool import cgroups
from pool.errors import BackendUnavailable
from pool.freezer import CgroupFreezer

WANTED = frozenset({"memory", "pids", "cpu", "cpuacct", "freezer"})
CPU_PERIOD_US = 100_000
OWN_PIDS = 4  # the sandbox's own processes: entering, monitor, init, and one to spare
KILL_TIMEOUT_S = 10.0
KILL_POLL_S = 0.001
DAEMON_LEAF = "poold-daemon"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance may use."""

    memory_mb: int
    pids: int
    cpu: float  # cores


@dataclass(frozen=True, slots=True)
class Parents:
    """The directories that instances' cgroups are made in, by what each is for ("freezer" is on v2 always there)."""

    version: dict[Path, int]
    directory: dict[str, Path]  # by controller

    @classmethod
    def find(cls, *, versions: tuple[int, ...] = (1, 2)) -> Parents:
        """Look for what this process may write: v1 hierarchies first, v2 for what they lack. Never raises."""
        version: dict[Path, int] = {}
        directory: dict[str, Path] = {}
        own = cgroups.membership()
        for hierarchy in sorted(cgroups.hierarchies(), key=lambda h: h.version):
            path = cgroups.path_in(hierarchy, own)
            where = hierarchy.directory(path) if path is not None else None
            if hierarchy.version not in versions or where is None or not os.access(where, os.W_OK):
                continue
            lacking = WANTED - directory.keys()
            found = hierarchy.controllers & lacking if hierarchy.version == 1 else _v2_controllers(where, lacking)
            if found:
                version[where] = hierarchy.version
                directory.update(dict.fromkeys(found, where))
        return cls(version, directory)

    def create(self, name: str, limits: Limits) -> InstanceCgroup:
        """Make the cgroup `name` with its limits, as far as there are controllers. Raises OSError, leaving nothing."""
        made = InstanceCgroup(self, name)
        done: list[Path] = []
        try:
            for directory in made.directories:
                directory.mkdir()
                done.append(directory)
            made.limit(limits)
        except OSError:
            for directory in done:
                directory.rmdir()
            raise
        return made

    def named(self, prefix: str) -> set[str]:
        """The names of the cgroups here that begin with `prefix`."""
        found: set[str] = set()
        for parent in self.version:
            with contextlib.suppress(OSError):
                found.update(e.name for e in os.scandir(parent) if e.is_dir() and e.name.startswith(prefix))
        return found


def _v2_controllers(where: Path, lacking: frozenset[str]) -> frozenset[str]:
    """Make the controllers of a v2 directory available to its children; freezing and CPU time need none."""
    found = lacking & {"freezer", "cpuacct"}
    offered = set((where / "cgroup.controllers").read_text().split())
    for controller in sorted(lacking & offered):
        try:
            try:
                cgroups.write(where / "cgroup.subtree_control", f"+{controller}")
            except OSError as exc:
                # A directory with processes cannot give controllers to children. A service with a delegated cgroup
                # is alone in it, and so may step aside.
                if exc.errno != errno.EBUSY or (where / "cgroup.procs").read_text().split() != [str(os.getpid())]:
                    continue
                (where / DAEMON_LEAF).mkdir(exist_ok=True)
                cgroups.write(where / DAEMON_LEAF / "cgroup.procs", "0")
                cgroups.write(where / "cgroup.subtree_control", f"+{controller}")
        except OSError:
            continue
        found |= {controller}
    return frozenset(found)


class InstanceCgroup:
    """The cgroup of one instance, in as many directories as the host's layout asks for."""

    __slots__ = ("_parents", "directories", "freezer", "name")

    def __init__(self, parents: Parents, name: str) -> None:
        """Name one that exists; Parents.create makes one."""
        self._parents = parents
        self.name = name
        self.directories = [parent / name for parent in parents.version]
        freezing = parents.directory.get("freezer")
        self.freezer = CgroupFreezer(parents.version[freezing], freezing / name) if freezing else None

    def procs_files(self) -> list[str]:
        """A process that writes 0 to each of these is in it."""
        return [str(directory / "cgroup.procs") for directory in self.directories]

    def limit(self, limits: Limits) -> None:
        """Write the limits. Raises OSError."""
        memory, pids, cpu = self._where("memory"), self._where("pids"), self._where("cpu")
        memory_bytes = str(limits.memory_mb * 1024 * 1024)
        if memory:
            v1 = self._is_v1("memory")
            cgroups.write(memory / ("memory.limit_in_bytes" if v1 else "memory.max"), memory_bytes)
            # A host without swap accounting has no such file.
            with contextlib.suppress(FileNotFoundError):
                swap, most = ("memory.memsw.limit_in_bytes", memory_bytes) if v1 else ("memory.swap.max", "0")
                cgroups.write(memory / swap, most)
        if pids:
            cgroups.write(pids / "pids.max", str(limits.pids + OWN_PIDS))
        if cpu:
            quota = max(1000, int(limits.cpu * CPU_PERIOD_US))
            name, text = ("cpu.cfs_quota_us", str(quota))
            if not self._is_v1("cpu"):
                name, text = ("cpu.max", f"{quota} {CPU_PERIOD_US}")
            try:
                cgroups.write(cpu / name, text)
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # more than the daemon's own cgroup has: that one's limit holds
                    raise

    def pids(self) -> list[int]:
        """Every process in it."""
        found: set[int] = set()
        for file in self.procs_files():
            with contextlib.suppress(OSError):
                # 0 stands for a process of another pid namespace; to kill(2) it would mean our own group.
                found.update(pid for pid in map(int, Path(file).read_text().split()) if pid > 0)
        return sorted(found)

    def memory_mb(self) -> float | None:
        """Memory in use without page cache that can go; None without the controller. Raises OSError."""
        where = self._where("memory")
        if where is None:
            return None
        current, inactive = "memory.current", "inactive_file"
        if self._is_v1("memory"):
            current, inactive = "memory.usage_in_bytes", "total_inactive_file"
        used = int((where / current).read_text())
        return max(0, used - _field(where / "memory.stat", inactive)) / (1024 * 1024)

    def cpu_s(self) -> float | None:
        """CPU time used so far; None where nothing counts it. Raises OSError."""
        where = self._where("cpuacct")
        if where is None:
            return None
        if self._is_v1("cpuacct"):
            return int((where / "cpuacct.usage").read_text()) / 1e9
        return _field(where / "cpu.stat", "usage_usec") / 1e6

    def out_of_memory(self) -> bool:
        """True when the kernel has killed one of its processes for want of memory."""
        where = self._where("memory")
        if where is None:
            return False
        with contextlib.suppress(OSError):
            name = "memory.oom_control" if self._is_v1("memory") else "memory.events"
            return _field(where / name, "oom_kill") > 0
        return False

    async def kill_all(self) -> None:
        """Thaw it, then kill until no process is left. Raises BackendUnavailable when the kernel does not end them."""
        deadline = trio.current_time() + KILL_TIMEOUT_S
        while left := self.pids():
            if self.freezer:
                with contextlib.suppress(OSError):
                    self.freezer.thaw()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if trio.current_time() > deadline:
                raise BackendUnavailable(f"{self.name}: processes {left} do not end", hint="they wait for a device")
            await trio.sleep(KILL_POLL_S)

    def rmdir(self) -> bool:
        """Remove its directories; True when none is left. It must have no process."""
        gone = True
        for directory in self.directories:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                gone = False
        return gone

    async def remove(self) -> None:
        """kill_all(), then remove the directories. Raises BackendUnavailable."""
        await self.kill_all()
        deadline = trio.current_time() + KILL_TIMEOUT_S
        while not await trio.to_thread.run_sync(self.rmdir):
            if trio.current_time() > deadline:
                raise BackendUnavailable(f"cannot remove the cgroup {self.name}", hint="something entered it")
            await trio.sleep(KILL_POLL_S)  # a process that has died leaves its cgroup a moment later

    def _where(self, controller: str) -> Path | None:
        parent = self._parents.directory.get(controller)
        return None if parent is None else parent / self.name

    def _is_v1(self, controller: str) -> bool:
        return self._parents.version[self._parents.directory[controller]] == 1


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
