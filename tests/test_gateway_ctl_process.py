"""poolctl as a process: what it loads, and how it ends when it is interrupted or nobody reads."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateway_fake_daemon import Canned, FakeDaemon, canned, function_row, running, status_info

from gateway.apis import views

COMMAND = [sys.executable, "-m", "gateway.ctl"]
LINE = b'{"at": "t", "instance": "3-1", "invocation": "", "stream": "stdout", "text": "printed"}\n'
HEAVY = ("trio", "docker", "rich", "msgspec", "yaml", "http.client", "psutil")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with running(tmp_path / "d.sock") as fake:
        yield fake


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from gateway import ctl; assert ctl.run(['--help']) == 0;"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_ctrl_c_ends_a_following_without_a_traceback(daemon: FakeDaemon) -> None:
    ended = threading.Event()

    def parts() -> Iterator[bytes]:
        yield LINE
        ended.wait(60)

    daemon.on("GET", "/v1/functions/hello/logs", Canned(200, parts()))
    command = [*COMMAND, "-H", daemon.host, "logs", "-f", "hello"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"3-1 | printed\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        ended.set()
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err


def test_a_reader_that_has_had_enough_is_no_error(daemon: FakeDaemon) -> None:
    daemon.on("GET", "/v1/functions/hello/logs", Canned(200, [LINE * 1000] * 20))
    command = [*COMMAND, "-H", daemon.host, "logs", "hello"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.wait(timeout=60)
    assert (process.returncode, err) == (141, b"")


def test_top_on_a_terminal_looks_again_and_leaves_on_ctrl_c(daemon: FakeDaemon) -> None:
    looks = threading.Semaphore(0)

    def status(_: object) -> Canned:
        looks.release()
        return canned(status_info())

    daemon.on("GET", "/v1/status", status)
    daemon.on("GET", "/v1/functions", canned(views.FunctionList([function_row("hello")])))
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    command = [*COMMAND, "-H", daemon.host, "top", "-i", "0.1"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = bytearray()
        reading = threading.Thread(target=_drain, args=(ours, shown))
        reading.start()
        for _ in range(3):
            assert looks.acquire(timeout=60)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)
        reading.join()
    os.close(ours)
    text = shown.decode()
    assert "hello" in text
    assert "CALLS/s" in text
    assert "Traceback" not in text
    assert text.rstrip().endswith(("\x1b[?1049l", "\x1b[?25h"))  # the screen is given back


def _drain(descriptor: int, into: bytearray) -> None:
    while True:
        try:
            data = os.read(descriptor, 65_536)
        except OSError:
            return
        if not data:
            return
        into += data
