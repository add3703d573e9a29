"""The private engine that the tests and the demo use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import engine as engine_module
from scripts.engine import Engine, EngineError, answers, main

SCRIPT = Path(engine_module.__file__)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: a socket goes in it."""
    path = Path(f"/tmp/poold-test-{uuid.uuid4().hex[:8]}")
    yield path
    Engine(path).stop(purge=True)


def processes_of(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command and int(entry.name) != os.getpid():
            found.append(command.replace(b"\0", b" ").decode())
    return found


def test_start_twice_restart_and_stop_by_hand(folder: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)

    url = f"unix://{folder}/docker.sock\n"
    assert run("start", str(folder)).stdout == url
    pid = (folder / "pid").read_text()
    assert run("start", str(folder)).stdout == url
    assert (folder / "pid").read_text() == pid
    assert run("restart", str(folder)).stdout == url
    assert (folder / "pid").read_text() != pid
    assert answers(folder / "docker.sock")
    assert run("stop", str(folder), "--purge").returncode == 0
    assert not folder.exists()
    assert processes_of(folder) == []
    assert run("stop", str(folder)).returncode == 0


def test_it_starts_again_after_a_crash(folder: Path) -> None:
    engine = Engine(folder, own_rules=False).start()
    engine.kill()
    assert not answers(engine.socket_path)
    engine.start()
    assert answers(engine.socket_path)
    engine.stop()
    assert processes_of(folder) == []
    assert not [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]


def test_no_dockerd(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert main(["start", str(folder)]) == 1
    assert "apt-get install docker.io" in capsys.readouterr().err
    assert not folder.exists()


def test_a_dockerd_that_fails_says_why(folder: Path) -> None:
    with pytest.raises(EngineError, match="no-such-option"):
        Engine(folder, extra=["--no-such-option"]).start()


def test_a_directory_too_deep_for_a_socket(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="too long for a socket"):
        Engine(tmp_path / ("x" * 100)).start()


def test_a_pid_that_is_somebody_elses_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "pid").write_text(str(os.getpid()))
    Engine(folder).stop()
    assert not (folder / "pid").exists()
