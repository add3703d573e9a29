"""make demo: it shows what it promises, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import psutil
import pytest

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 240
NO_ENGINE = "unix:///no/engine/here.sock"


@contextmanager
def demo(*options: str, engine: str) -> Iterator[subprocess.Popen[str]]:
    """A demo that runs; killed when the block ends before it does."""
    with subprocess.Popen(
        [sys.executable, "scripts/demo.py", *options],
        cwd=ROOT,
        env={**os.environ, "DOCKER_HOST": engine, "COLUMNS": "160", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], wanted: str) -> str:
    """Its output up to the first line with `wanted`."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if wanted in line:
            return said
    raise AssertionError(f"it never said {wanted!r}:\n{said}")


def left_behind(directory: str) -> list[str]:
    """Processes that were started for the demo in `directory`."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        told = " ".join(process.info["cmdline"] or [])
        if directory in told or directory in (process.info["cwd"] or ""):
            found.append(told)
    return found


def run_directory(process: subprocess.Popen[str]) -> str:
    """The directory of a demo's own, from its daemon's command line."""
    for child in psutil.Process(process.pid).children():
        command = child.cmdline()
        if "--state-dir" in command:
            return str(Path(command[command.index("--state-dir") + 1]).parent)
    raise AssertionError("it has no daemon")


def on_engine(host: str) -> set[str]:
    """Everything on an engine that a poold or a demo may have made."""
    client = docker.DockerClient(base_url=host)
    try:
        found = {f"container {each.id}" for each in client.containers.list(all=True)}
        found |= {f"network {each.name}" for each in client.networks.list()}
        found |= {f"volume {each.name}" for each in client.volumes.list()}
        return found | {f"image {each.id}" for each in client.images.list()}
    finally:
        client.close()


def test_without_an_engine_it_says_what_it_tried_and_runs_on_processes() -> None:
    with demo("--samples", "1", engine=NO_ENGINE) as process:
        said = until(process, "deployed")
        directory = run_directory(process)
        assert left_behind(directory)  # the look for what is left behind does see the daemon
        said += process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0, said
    assert f"no Docker engine answers (tried {NO_ENGINE}: DOCKER_HOST; " in said
    assert "poold runs on the process backend" in said
    assert "left out scratch-image: it is an image, and needs a Docker engine" in said
    for row in ("cold: no instance there", "pre-started", "used before and frozen", "warm: used before"):
        assert re.search(rf"{re.escape(row)}[^\n]* [\d.]+ ms", said), said
    assert "docker run" not in said
    assert left_behind(directory) == []
    assert not Path(directory).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing(number: signal.Signals) -> None:
    with demo(engine=NO_ENGINE) as process:
        said = until(process, "deployed")
        directory = run_directory(process)
        process.send_signal(number)
        said += process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 128 + number, said
    assert f"ended by {number.name}" in said
    assert left_behind(directory) == []
    assert not Path(directory).exists()


def test_a_demo_whose_daemon_dies_says_so_and_leaves_nothing() -> None:
    with demo(engine=NO_ENGINE) as process:
        said = until(process, "deployed")
        directory = run_directory(process)
        for child in psutil.Process(process.pid).children():
            child.kill()
        said += process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert left_behind(directory) == []
    assert not Path(directory).exists()


def test_with_an_engine_it_compares_with_docker_run(docker_host: str) -> None:
    before = on_engine(docker_host)
    with demo("--samples", "1", engine=docker_host) as process:
        said = until(process, "deployed")
        directory = run_directory(process)
        said += process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0, said
    assert "poold runs on the docker backend" in said
    row = next(line for line in said.splitlines() if "docker run, without poold" in line)
    assert len(re.findall(r"[\d.]+ ms", row)) == 3, said
    assert left_behind(directory) == []
    assert on_engine(docker_host) <= before
