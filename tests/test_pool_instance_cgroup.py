"""An instance's cgroup, on the real v1 and v2 hierarchies of the host."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from pool import cgroups
from pool.instance_cgroup import InstanceCgroup, Limits, Parents, _v2_controllers

LIMITS = Limits(memory_mb=64, pids=16, cpu=0.5)


@pytest.fixture(params=sorted({(h.version,) for h in cgroups.hierarchies()} | {(1, 2)}))
def parents(request: pytest.FixtureRequest) -> Parents:
    found = Parents.find(versions=request.param)
    assert "freezer" in found.directory, "run these tests as root: no cgroup is writable"
    return found


@pytest.fixture
def cgroup(parents: Parents) -> Iterator[InstanceCgroup]:
    made = parents.create(f"poold-test-{os.getpid()}", LIMITS)
    yield made
    trio.run(made.remove)
    assert not any(directory.exists() for directory in made.directories)


def enter(cgroup: InstanceCgroup, command: str) -> subprocess.Popen[bytes]:
    """A process in it that has printed "ready" and then runs `command`."""
    lines = "".join(f'echo 0 > "{file}"; ' for file in cgroup.procs_files())
    process = subprocess.Popen(["sh", "-c", lines + "echo ready; " + command], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def text(parents: Parents, controller: str, cgroup: InstanceCgroup, v1: str, v2: str) -> str:
    where = parents.directory[controller]
    return (where / cgroup.name / (v1 if parents.version[where] == 1 else v2)).read_text().strip()


def test_limits_are_written_where_there_are_controllers(parents: Parents, cgroup: InstanceCgroup) -> None:
    if 1 in parents.version.values():
        assert {"memory", "pids", "cpu"} <= parents.directory.keys()
    if "memory" in parents.directory:
        assert text(parents, "memory", cgroup, "memory.limit_in_bytes", "memory.max") == str(64 << 20)
    if "pids" in parents.directory:
        assert text(parents, "pids", cgroup, "pids.max", "pids.max") == "20"
    if "cpu" in parents.directory:
        assert text(parents, "cpu", cgroup, "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"


@pytest.mark.trio
async def test_frozen_processes_are_killed_to_the_last(cgroup: InstanceCgroup) -> None:
    process = enter(cgroup, "sleep 1000 & sleep 1000 & wait")
    with process:
        assert process.pid in cgroup.pids()
        assert cgroup.freezer is not None
        cgroup.freezer.freeze()
        await cgroup.freezer.settle()
        with trio.fail_after(5):
            await cgroup.kill_all()
        assert cgroup.pids() == []


def test_use_is_measured(parents: Parents, cgroup: InstanceCgroup) -> None:
    with enter(cgroup, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; exec sleep 1000") as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert (cgroup.cpu_s() or 0) > 0
        if "memory" in parents.directory:
            assert 0 < (cgroup.memory_mb() or 0) < 64
        assert not cgroup.out_of_memory()
        process.kill()


def test_out_of_memory_is_seen(parents: Parents, cgroup: InstanceCgroup) -> None:
    if "memory" not in parents.directory:
        assert not cgroup.out_of_memory()
        return
    hungry = "exec /usr/bin/python3 -c 'b = bytearray(200 << 20)'"
    with enter(cgroup, hungry) as process:
        assert process.wait(20) == -9
    assert cgroup.out_of_memory()


def test_leftovers_are_found_by_name(parents: Parents, cgroup: InstanceCgroup) -> None:
    assert parents.named(f"poold-test-{os.getpid()}") == {cgroup.name}
    assert parents.named("poold-test-of-nobody-") == set()


def test_a_name_that_exists_is_refused_and_stays(parents: Parents, cgroup: InstanceCgroup) -> None:
    with pytest.raises(FileExistsError):
        parents.create(cgroup.name, LIMITS)
    assert all(directory.exists() for directory in cgroup.directories)


@pytest.mark.trio
async def test_removing_twice_is_harmless(cgroup: InstanceCgroup) -> None:
    await cgroup.remove()
    await cgroup.remove()


def test_v2_without_controllers_still_freezes_and_counts_cpu_time(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("hugetlb\n")
    wanted = frozenset({"memory", "freezer", "cpuacct"})
    assert _v2_controllers(tmp_path, wanted) == {"freezer", "cpuacct"}


def test_v2_controllers_are_given_to_children(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory pids io\n")
    (tmp_path / "cgroup.subtree_control").write_text("")
    assert _v2_controllers(tmp_path, frozenset({"memory", "cpu"})) == {"memory"}
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
