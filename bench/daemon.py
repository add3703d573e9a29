"""The poold that is measured: one of the benchmark's own, with its own state, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import psutil

from bench.target import Target, parse_target
from gateway.client import Client, function_path
from gateway.client_errors import ClientError
from gateway.codetar import CodeDirectoryError, write_tar
from pool.spec import FunctionSpec

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.005


class DaemonFailed(Exception):
    """poold did not start, or did not do what was asked; says what it said."""


class Poold:
    """A running poold: deploys, looks, removes. Everything deployed by it is removed at the end."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.deployed: list[str] = []
        self._digests: dict[Path, str] = {}

    def status(self) -> dict[str, Any]:
        """GET /v1/status. Raises ClientError."""
        found: dict[str, Any] = self.client.call("GET", "/v1/status")
        return found

    def facts(self) -> dict[str, str]:
        """For the machine's line of a result."""
        status = self.status()
        engine = status["engine"]
        version = str(engine.get("engine", ""))  # its address (and version)
        facts = {"backend": str(status["backend"]), "poold": str(status["version"])}
        facts["engine"] = version.rpartition("(")[2].rstrip(")")
        facts["sandbox"] = str(engine.get("sandbox", ""))
        return facts

    def process(self) -> psutil.Process:
        """The daemon's process. Raises DaemonFailed when it is not on this host."""
        try:
            return psutil.Process(int(self.status()["pid"]))
        except psutil.NoSuchProcess:
            raise DaemonFailed("the daemon's process is not on this host: measure where it runs") from None

    def target(self, path: str = "/") -> Target:
        """Where its functions are asked: its first TCP address, else its Unix socket."""
        for address in self.status()["listen"]:
            text = str(address).removeprefix("http://").removeprefix("tcp://")
            host, colon, port = text.rpartition(":")
            if colon and port.isdigit() and "/" not in text:
                host = "127.0.0.1" if host in ("0.0.0.0", "") else host
                return parse_target(f"http://{host}:{port}{path}")
        return parse_target(f"http+unix://{quote(self.client.host.removeprefix('unix://'), safe='')}{path}")

    def deploy(self, spec: FunctionSpec, code: Path | None) -> dict[str, Any]:
        """Deploy and wait for the floor. Raises ClientError, DaemonFailed."""
        path = function_path(spec.name) + "?wait=true"
        if code is not None:
            path += f"&code={quote(self.upload(code))}"
        self.deployed.append(spec.name)
        result: dict[str, Any] = self.client.call("PUT", path, body=msgspec.to_builtins(spec))
        return result

    def upload(self, code: Path) -> str:
        """The digest of a code directory, uploaded once. Raises ClientError, DaemonFailed."""
        if code not in self._digests:
            with tempfile.TemporaryFile() as tar:
                try:
                    write_tar(code, tar)
                except (CodeDirectoryError, OSError) as exc:
                    raise DaemonFailed(str(exc)) from None
                length = tar.tell()
                tar.seek(0)
                headers = [("Content-Type", "application/x-tar")]
                with self.client.request("PUT", "/v1/code", body=tar, headers=headers, length=length) as answer:
                    if answer.status >= 400:
                        raise answer.failure()
                    self._digests[code] = str(answer.json()["digest"])
        return self._digests[code]

    def remove(self, name: str) -> None:
        """Remove a function. Raises ClientError."""
        self.client.call("DELETE", function_path(name))
        self.deployed.remove(name)

    def instances(self, name: str) -> list[dict[str, Any]]:
        """A function's instances. Raises ClientError."""
        found: list[dict[str, Any]] = self.client.call("GET", function_path(name))["instance_list"]
        return found

    def wait(
        self, name: str, wanted: Callable[[list[dict[str, Any]]], bool], timeout_s: float = 60.0
    ) -> list[dict[str, Any]]:
        """Until a function's instances are as wanted. Raises DaemonFailed when they do not become so."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            found = self.instances(name)
            if wanted(found):
                return found
            if time.monotonic() > deadline_s:
                states = ", ".join(f"{one['state']} after {one['uses']} uses" for one in found) or "none"
                raise DaemonFailed(f"{name}: its instances did not get ready in {timeout_s:g} s; they are: {states}")
            time.sleep(POLL_S)

    def remove_all(self) -> None:
        """Remove what was deployed, as far as poold answers."""
        for name in list(self.deployed):
            with contextlib.suppress(ClientError):
                self.remove(name)


@contextlib.contextmanager
def own_poold(backend: str) -> Iterator[Poold]:
    """A poold of the benchmark's own, gone with all it made at the end. Raises DaemonFailed."""
    directory = Path(tempfile.mkdtemp(prefix="poolbench-"))
    directory.chmod(0o711)  # instances run as nobody and must reach their code
    log_path = directory / "poold.log"
    host = f"unix://{directory}/poold.sock"
    config = directory / "poold.toml"
    config.write_text("")  # the defaults, whatever this host's own poold is told in /etc
    command = [sys.executable, "-m", "gateway.daemon", "--config", str(config), "--state-dir", f"{directory}/state"]
    command += ["--socket", f"{directory}/poold.sock", "--listen", "127.0.0.1:0", "--backend", backend]
    try:
        with log_path.open("wb") as log:
            # A session of its own: a Ctrl-C is ours, and we end it in order.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            client = Client(host, timeout_s=120)
            _wait_ready(process, client, log_path)
            poold = Poold(client)
            try:
                yield poold
            finally:
                poold.remove_all()
        finally:
            _end(process)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _wait_ready(process: subprocess.Popen[bytes], client: Client, log_path: Path) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        with contextlib.suppress(ClientError):
            client.call("GET", "/healthz")
            return
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline_s:
            said = "\n".join(log_path.read_text(errors="replace").splitlines()[-10:])
            raise DaemonFailed(f"poold {'ended at once' if ended else 'did not get ready'}. It said:\n{said}")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    with interrupts_ignored():  # a second Ctrl-C must not leave its containers behind
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """The block runs to its end whatever is pressed. Outside the main thread it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def poold_to_measure(host: str | None, backend: str) -> Iterator[Poold]:
    """The poold at `host`, or one of our own. What was deployed is removed. Raises DaemonFailed, ClientError."""
    if host is None:
        with own_poold(backend) as poold:
            yield poold
        return
    poold = Poold(Client(host, timeout_s=120))
    poold.status()
    try:
        yield poold
    finally:
        poold.remove_all()
