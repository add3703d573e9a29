"""The scripts behind make test and CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        # Not those of a make that runs these tests: a make in here shall behave as in a terminal.
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("def test_a(): pass", 0, ""),
        ("import pytest\ndef test_a(): pytest.skip('no engine')", 1, "test_inner::test_a: no engine"),
        ("import pytest\n@pytest.mark.xfail(reason='later')\ndef test_a(): assert 0", 1, "test_inner::test_a"),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass", 1, "none may be"),
        ("", 1, "no test ran"),
    ],
)
def test_a_run_that_skips_or_runs_nothing_is_a_failure(tmp_path: Path, body: str, code: int, said: str) -> None:
    (tmp_path / "test_inner.py").write_text(body)
    report = tmp_path / "report.xml"
    options: list[str | Path] = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        "-c",
        os.devnull,
        f"--junitxml={report}",
    ]
    # This run's own plugins have no say in that one, and it starts sooner without them.
    run(sys.executable, "-m", "pytest", *options, tmp_path / "test_inner.py", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = run(sys.executable, "scripts/noskip.py", report)
    assert done.returncode == code
    assert said in done.stderr


def test_a_report_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    done = run(sys.executable, "scripts/noskip.py", tmp_path / "none.xml")
    assert done.returncode == 2
    assert "cannot read" in done.stderr


def test_what_is_missing_comes_with_the_command_that_installs_it(tmp_path: Path) -> None:
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in ("bash", "ldd", "id", "uname", "grep"):
        (bare / name).symlink_to(f"/usr/bin/{name}")
    # The script adds the usual directories of administrators' programs; here they must not help.
    script = tmp_path / "needs.sh"
    script.write_text((ROOT / "scripts/needs.sh").read_text().replace('PATH="$PATH:', 'ignored="$PATH:'))
    listed = run("/bin/bash", script, PATH=str(bare), DOCKER_HOST="")
    assert {"docker.io", "bubblewrap", "iproute2", "nodejs"} <= set(listed.stdout.split())
    checked = run("/bin/bash", script, "--check", PATH=str(bare), DOCKER_HOST="")
    assert checked.returncode == 1
    assert "apt-get install --no-install-recommends" in checked.stderr
    assert "docker.io" in checked.stderr
    with_engine = run("/bin/bash", script, PATH=str(bare), DOCKER_HOST="unix:///some/docker.sock")
    assert "docker.io" not in with_engine.stdout


def test_make_help_lists_the_commands() -> None:
    done = run("make", "help")
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["help", "demo", "test", "lint", "format", "clean"]


def test_make_names_what_is_missing_to_make_an_environment(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\ncase "$2" in *version_info*) exit 1;; esac\n')
    old.chmod(0o755)
    done = run("make", "test", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert f"Python 3.11 or newer is needed, {old} is Python 3.9.2." in done.stderr
    assert "make PYTHON=" in done.stderr
    old.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    done = run("make", "test", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr
