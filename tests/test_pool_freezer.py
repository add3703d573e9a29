"""Freezing by cgroup files, on the real v1 and v2 hierarchies of the host."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from pool import cgroups
from pool.freezer import CgroupFreezer

# Answers each line on its input by one on its output: frozen means no answer.
ECHO = "while read line; do echo answer $line; done"


def mounted_versions() -> list[int]:
    found = {h.version for h in cgroups.hierarchies() if h.version == 2 or "freezer" in h.controllers}
    return sorted(found)


@pytest.fixture(params=mounted_versions())
def directory(request: pytest.FixtureRequest) -> Iterator[tuple[int, Path]]:
    """An empty cgroup of each version that is mounted here."""
    version = request.param
    hierarchy = next(
        h for h in cgroups.hierarchies() if h.version == version and (version == 2 or "freezer" in h.controllers)
    )
    path = hierarchy.mount / f"poold-test-freezer-{os.getpid()}"
    path.mkdir()
    yield version, path
    path.rmdir()


@pytest.fixture
def echo(directory: tuple[int, Path]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in that cgroup."""
    version, path = directory
    with subprocess.Popen(
        ["sh", "-c", f'echo 0 > "{path}/cgroup.procs"; echo ready; {ECHO}'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        with contextlib.suppress(OSError):
            CgroupFreezer(version, path).thaw()
        process.kill()


def ask(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"x\n")
    process.stdin.flush()


@pytest.mark.trio
async def test_frozen_means_no_answer_until_thawed(directory: tuple[int, Path], echo: subprocess.Popen[bytes]) -> None:
    version, path = directory
    freezer = CgroupFreezer.for_pid(echo.pid, version=version)
    assert freezer is not None
    assert (freezer.version, freezer.directory) == (version, path)
    assert not freezer.frozen()
    freezer.freeze()
    await freezer.settle()
    assert freezer.frozen()
    ask(echo)
    assert echo.stdout is not None
    with trio.move_on_after(0.05) as limit:
        await trio.lowlevel.wait_readable(echo.stdout)
    assert limit.cancelled_caught
    freezer.thaw()
    assert echo.stdout.readline() == b"answer x\n"
    assert not freezer.frozen()


@pytest.mark.trio
async def test_freezing_twice_and_thawing_twice_are_harmless(
    directory: tuple[int, Path], echo: subprocess.Popen[bytes]
) -> None:
    freezer = CgroupFreezer.for_pid(echo.pid, version=directory[0])
    assert freezer is not None
    freezer.freeze()
    freezer.freeze()
    await freezer.settle()
    freezer.thaw()
    freezer.thaw()
    ask(echo)
    assert echo.stdout is not None
    assert echo.stdout.readline() == b"answer x\n"


def test_v1_is_taken_first_and_only_where_the_process_has_a_cgroup_of_its_own(
    directory: tuple[int, Path], echo: subprocess.Popen[bytes]
) -> None:
    # The process is in its own cgroup of one version only, so that is the one found.
    found = CgroupFreezer.for_pid(echo.pid)
    assert found is not None
    assert found.directory == directory[1]


def test_never_a_cgroup_that_the_daemon_is_in() -> None:
    assert CgroupFreezer.for_pid(os.getpid()) is None
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        assert CgroupFreezer.for_pid(child.pid) is None
        child.kill()


def test_a_process_that_has_ended_has_none() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert CgroupFreezer.for_pid(process.pid) is None


@pytest.mark.trio
async def test_v1_freezing_for_a_while_is_asked_again(tmp_path: Path) -> None:
    state = tmp_path / "freezer.state"
    state.write_text("FREEZING\n")
    freezer = CgroupFreezer(1, tmp_path)
    assert not freezer.frozen()
    with trio.fail_after(5):
        await freezer.settle()  # the file is no kernel file: writing FROZEN to it is what makes it say so
    assert freezer.frozen()


@pytest.mark.trio
async def test_what_does_not_freeze_is_thawed(tmp_path: Path) -> None:
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    (tmp_path / "cgroup.freeze").write_text("1")
    with pytest.raises(TimeoutError, match="did not freeze"):
        await CgroupFreezer(2, tmp_path).settle(timeout_s=0.01)
    assert (tmp_path / "cgroup.freeze").read_text() == "0"


def test_a_cgroup_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CgroupFreezer(2, tmp_path / "gone").freeze()


MOUNTINFO = r"""31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu\040time rw,relatime - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 /box /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
"""


def test_hierarchies_are_read_from_the_mounts() -> None:
    v1, v2 = cgroups.hierarchies(MOUNTINFO)
    assert (v1.version, v1.mount, v1.controllers) == (
        1,
        Path("/sys/fs/cgroup/cpu time"),
        frozenset({"cpu", "cpuacct"}),
    )
    assert v1.directory("/docker/x") == Path("/sys/fs/cgroup/cpu time/docker/x")
    assert v2.version == 2
    assert v2.directory("/box/docker/x") == Path("/sys/fs/cgroup/unified/docker/x")
    assert v2.directory("/boxes") is None
    assert v2.directory("/../other") is None
