"""A private Docker engine for tests and the demo: `python scripts/engine.py start DIR`, then `stop DIR`.

Everything of it lives in DIR: data, socket (DIR/docker.sock), pid file and log. It installs nothing. The engine
already on a machine, its images and its containers are not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
CONTAINER_GRACE_S = 2  # for containers that still run when it is stopped
POLL_S = 0.05
MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 107; dockerd appends a little to names beside it


class EngineError(Exception):
    """The engine could not be started or stopped; the text says what to do."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("docker", timeout=5)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def answers(socket_path: Path) -> bool:
    """True when a Docker engine answers its ping on this Unix socket."""
    connection = _UnixConnection(socket_path)
    try:
        connection.request("GET", "/_ping")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _alive(pid: int) -> bool:
    """False for a zombie too: its command line is empty."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


class Engine:
    """One dockerd with all its state in `directory`.

    `extra` are further dockerd arguments, for example a TCP listener. With `own_rules` False it leaves the host's
    packet filter alone, for a second engine beside another one; it should then run containers without a network.
    """

    def __init__(self, directory: str | Path, *, extra: Sequence[str] = (), own_rules: bool = True) -> None:
        self.directory = Path(directory).absolute()
        self.socket_path = self.directory / "docker.sock"
        self.pid_path = self.directory / "pid"
        self.log_path = self.directory / "log"
        self.extra = list(extra)
        self.own_rules = own_rules
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What DOCKER_HOST must be to reach it."""
        return f"unix://{self.socket_path}"

    def start(self) -> Engine:
        """Start it and wait until it answers. Raises EngineError."""
        if answers(self.socket_path):
            return self
        dockerd = self._find_dockerd()
        if len(str(self.socket_path)) > MAX_SOCKET_PATH_BYTES:
            raise EngineError(f"{self.socket_path} is too long for a socket; use a shorter directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket_path.unlink(missing_ok=True)
        if self._pid() is None:
            self.pid_path.unlink(missing_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [dockerd, *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not answers(self.socket_path):
            code = self._process.poll()
            if code is not None:
                raise EngineError(f"dockerd ended with code {code}:\n{self._log_tail()}")
            if time.monotonic() > deadline_s:
                self.stop()
                raise EngineError(f"dockerd did not answer within {START_TIMEOUT_S:.0f} s:\n{self._log_tail()}")
            time.sleep(POLL_S)
        return self

    def stop(self, *, purge: bool = False) -> None:
        """End it and its containers; with `purge` remove the directory too. Nothing to stop is no error."""
        pid = self._pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            if not self._wait_gone(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._wait_gone(pid)
        self._end_leftovers()
        self.pid_path.unlink(missing_ok=True)
        self.socket_path.unlink(missing_ok=True)
        if purge:
            shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> None:
        """End dockerd as a crash does: at once, leaving its containers running."""
        # Its containerd ends with it; as long as nobody has reaped that, the next start would take it for alive.
        containerd = self.directory / "exec/containerd/containerd.pid"
        for pid in (self._pid(), self._pid(containerd)):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._wait_gone(pid)
        containerd.unlink(missing_ok=True)

    def restart(self) -> None:
        """Stop it and start it again on the same data."""
        self.stop()
        self.start()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(purge=True)

    def _find_dockerd(self) -> str:
        path = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")
        if path is None:
            raise EngineError("dockerd is not installed; on Debian and Ubuntu: apt-get install docker.io")
        if os.geteuid() != 0:
            raise EngineError("dockerd needs root; run this as root, or set DOCKER_HOST to an engine you may use")
        return path

    def _arguments(self) -> list[str]:
        arguments = [
            f"--data-root={self.directory / 'data'}",
            f"--exec-root={self.directory / 'exec'}",
            f"--pidfile={self.pid_path}",
            f"--host={self.url}",
            f"--shutdown-timeout={CONTAINER_GRACE_S}",
        ]
        if not self.own_rules:
            # Not --bridge=none: that would delete the docker0 of the other engine.
            arguments += ["--iptables=false", "--ip6tables=false"]
        return arguments + self.extra

    def _pid(self, path: Path | None = None) -> int | None:
        """The running dockerd of this directory. A pid that now belongs to something else does not count."""
        try:
            pid = int((path or self.pid_path).read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return pid if str(self.directory).encode() in command else None

    def _wait_gone(self, pid: int) -> bool:
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if not _alive(pid):
                if self._process is not None and self._process.pid == pid:
                    self._process.wait()
                return True
            time.sleep(POLL_S)
        return False

    def _end_leftovers(self) -> None:
        """End what a crashed dockerd left (its containerd and shims) and undo its mounts."""
        marker = str(self.directory / "exec").encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                name = command.split(b"\0", 1)[0].rsplit(b"/", 1)[-1]
                if marker in command and name.startswith(b"containerd"):
                    os.kill(int(entry.name), signal.SIGKILL)
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        inside = [line.split()[1] for line in mounts if line.split()[1].startswith(f"{self.directory}/")]
        for target in sorted(inside, reverse=True):
            subprocess.run(["umount", "-l", target], stderr=subprocess.DEVNULL, check=False)

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])
        return ""


def main(arguments: Sequence[str]) -> int:
    """The command line; prints the DOCKER_HOST to use."""
    parser = argparse.ArgumentParser(description="Start or stop a private Docker engine.")
    parser.add_argument("action", choices=["start", "stop", "restart"])
    parser.add_argument("directory", help="where all its files live")
    parser.add_argument("--purge", action="store_true", help="with stop: remove the directory too")
    options = parser.parse_args(arguments)
    engine = Engine(options.directory)
    try:
        if options.action in ("stop", "restart"):
            engine.stop(purge=options.purge and options.action == "stop")
        if options.action in ("start", "restart"):
            engine.start()
            print(engine.url)
    except EngineError as exc:
        print(f"engine: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
