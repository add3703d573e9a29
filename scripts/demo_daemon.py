"""The demo's own poold: its process, its files, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from gateway.client import Client
from gateway.client_errors import ClientError

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 45.0  # longer than the daemon's own drain
POLL_S = 0.05
SOCKET_PATH_BYTES = 100  # the kernel takes 107
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """The demo cannot go on; the text says why and what to do."""


class DemoDaemon:
    """`with DemoDaemon(directory, backend) as daemon:` runs poold on a free port, ready when the block begins.

    It gets a session of its own, so that a Ctrl-C meant for the demo does not end it in the middle of something.
    """

    def __init__(self, directory: Path, backend: str) -> None:
        self._directory = directory
        self.socket_path = directory / "poold.sock"
        if len(os.fsencode(self.socket_path)) > SOCKET_PATH_BYTES:
            raise DemoError(f"{self.socket_path} is too long for a socket: move the checkout to a shorter path")
        self.host = f"unix://{self.socket_path}"
        self.log_path = directory / "poold.log"
        self._backend = backend
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> DemoDaemon:
        command: list[str | Path] = [
            *(sys.executable, "-m", "gateway.daemon"),
            *("--state-dir", self._directory / "state", "--socket", self.socket_path, "--listen", "127.0.0.1:0"),
            *("--backend", self._backend),
        ]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_ready(self._process)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        client = Client(self.host, timeout_s=5)
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise DemoError(f"poold ended at once (status {process.returncode}). It said:\n{self.log_tail()}")
            with contextlib.suppress(ClientError):
                client.call("GET", "/healthz")
                return
            time.sleep(POLL_S)
        raise DemoError(f"poold did not answer in {READY_TIMEOUT_S:.0f} s. It said:\n{self.log_tail()}")

    def _stop(self) -> None:
        """Let it drain and end its instances. A second Ctrl-C must not stop this half-way."""
        process, self._process = self._process, None
        if process is None:
            return
        with signals_ignored():
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                print(
                    f"poold did not end in {STOP_TIMEOUT_S:.0f} s and was killed:\n{self.log_tail()}", file=sys.stderr
                )

    def deploy(self, spec: Path) -> None:
        """What a user does: poolctl deploy. Raises DemoError with what it said."""
        command: list[str | Path] = [sys.executable, "-m", "gateway.ctl", "--host", self.host, "deploy", spec]
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoError(f"poolctl deploy {spec.name} failed:\n{done.stdout}{done.stderr}")

    def log_tail(self) -> str:
        """The last lines that it logged."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])
        return ""


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """The block runs to its end, whatever the user presses."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
