"""The poold that is measured, and how it is at rest: real ones, on the process backend."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from bench import cli, report, rest, workload
from bench.daemon import DaemonFailed, Poold, own_poold, poold_to_measure
from bench.plain import PlainFailed, plain_start
from gateway.client_errors import ClientError
from pool.spec import FunctionSpec, PoolSpec


@pytest.fixture
def directory() -> Iterator[Path]:
    """Reachable for whom instances run as, which pytest's own directories are not."""
    path = Path(tempfile.mkdtemp(prefix="poold-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def poold() -> Iterator[Poold]:
    with own_poold("process") as running:
        yield running


def test_the_result_of_rest_counts_children_apart() -> None:
    children = [{"name": "bwrap", "pid": n, "cpu_s": 0.1, "rss_mb": 2.0, "pss_mb": None} for n in (2, 3)]
    daemon = {"name": "python", "pid": 1, "cpu_s": 0.05, "rss_mb": 50.0, "pss_mb": 40.0}
    status = {"functions": 20, "instances": {"frozen": 40}}
    result = rest.as_result(report.machine(), status, 10.0, daemon, children)
    assert list(result) == ["poolbench", "schema", "machine", "functions", "instances", "seconds", "daemon", "children"]
    assert result["daemon"] == {"pid": 1, "cpu_percent": 0.5, "rss_mb": 50.0, "pss_mb": 40.0}
    assert result["children"] == [{"name": "bwrap", "count": 2, "cpu_percent": 2.0, "rss_mb": 4.0}]


def test_the_usage_of_a_process() -> None:
    shown = rest.usage(psutil.Process())
    assert shown["pid"] == os.getpid()
    assert shown["rss_mb"] > 1
    assert shown["cpu_s"] > 0


def test_the_rest_command(poold: Poold) -> None:
    arguments = ["rest", "--host", poold.client.host, "--functions", "2", "--frozen", "3", "-d", "0.2", "--json"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert (shown["functions"], shown["instances"]["frozen"]) == (2, 3)
    assert poold.status()["functions"] == 0


def test_what_a_poold_cannot_do_is_said(poold: Poold, directory: Path) -> None:
    with pytest.raises(ClientError, match="nowhere"):
        poold.deploy(FunctionSpec(name="nowhere", image="nowhere:1"), None)
    poold.deployed.clear()
    with pytest.raises(DaemonFailed, match="does not exist"):
        poold.upload(directory / "none")
    spec = workload.builtin(directory).variant("w", PoolSpec(min=0))
    poold.deploy(spec, directory / "builtin")
    with pytest.raises(DaemonFailed, match="they are: none"):
        poold.wait(spec.name, bool, timeout_s=0.0)
    poold.remove_all()


def _has_poold(parent: psutil.Process) -> bool:
    for child in parent.children():
        with contextlib.suppress(psutil.Error):
            if "--state-dir" in child.cmdline():
                return True
    return False


def test_an_interrupted_measurement_leaves_nothing(directory: Path) -> None:
    command = [sys.executable, "-m", "bench.cli", "rest", "--backend", "process", "--functions", "1", "--frozen", "1"]
    env = {**os.environ, "TMPDIR": str(directory)}
    process = subprocess.Popen([*command, "-d", "600"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)
    try:
        assert process.stdout is not None
        parent = psutil.Process(process.pid)
        while not _has_poold(parent):  # by then it ends in order; before, there is nothing to leave behind
            assert process.poll() is None
            time.sleep(0.01)
        children = parent.children(recursive=True)
        process.terminate()
        output = process.stdout.read().decode()
        assert process.wait() == 143
    finally:
        process.kill()
        process.communicate()
    assert "Traceback" not in output
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running()]
    assert list(directory.iterdir()) == []


def test_no_poold_and_no_plain_start_are_said() -> None:
    result = CliRunner().invoke(cli.main, ["rest", "--host", "unix:///nowhere/poold.sock"])
    assert result.exit_code == 1
    assert "does not answer" in result.output
    assert "Traceback" not in result.output
    with (
        pytest.raises(ClientError),
        poold_to_measure("http://127.0.0.1:1", "auto"),
    ):
        pytest.fail("nobody is there")
    work = workload.Workload(FunctionSpec(name="f", image="i"), Path(), workload.Ask("GET", "/"))
    with pytest.raises(PlainFailed, match="simulated"), plain_start(work, "simulated", "i"):
        pytest.fail("there is none")


def test_every_command_has_examples() -> None:
    for name, command in cli.main.commands.items():
        text = CliRunner().invoke(cli.main, [name, "--help"]).output
        assert "Examples:" in text
        assert command.help
