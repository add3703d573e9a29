"""A real poold process for the end-to-end tests: its own state, socket, port, network; and what it leaves."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from daemon_reply import Reply
from daemon_traces import instance_cgroups, processes_of
from daemon_waiting import WAIT_S, wait_until

from gateway.client import Answer, Client, function_path
from gateway.client_errors import ClientError
from gateway.codetar import write_tar
from pool.backends.docker_container import LABEL_DAEMON

ROOT = Path(__file__).parent.parent
FUNCTIONS = ROOT / "tests/functions"
SILENCE_S = 30.0  # the longest that an answer may keep a test waiting

Config = Mapping[str, Mapping[str, Any]]


@dataclass(slots=True)
class Poold:
    """One state directory, and the poold process that runs on it at the moment.

    `backend`: process, docker or auto. `config`: sections over the tests' own. Use it with `with`: it is running in
    the block, and after the block nothing of it may be left.
    """

    backend: str
    docker_host: str = ""
    config: Config = field(default_factory=dict)
    directory: Path = field(init=False)
    process: subprocess.Popen[bytes] | None = field(init=False, default=None)
    port: int = field(init=False, default=0)
    _daemon_id: str = field(init=False, default="")
    _client: Client = field(init=False)

    def __post_init__(self) -> None:
        # A short path, as sockets' must be, through which instances (other users) reach their code.
        self.directory = Path(tempfile.mkdtemp(prefix="poold-e2e-"))
        self.directory.chmod(0o711)
        self._client = Client(f"unix://{self.socket_path}", timeout_s=60)

    @property
    def socket_path(self) -> Path:
        """The Unix socket that administers."""
        return self.directory / "s"

    @property
    def host(self) -> str:
        """What poolctl's -H takes."""
        return f"unix://{self.socket_path}"

    @property
    def config_path(self) -> Path:
        """Its configuration; SIGHUP reads it again."""
        return self.directory / "poold.toml"

    @property
    def network(self) -> str:
        """The docker network that is this daemon's alone."""
        return self.directory.name

    # --- its life ---

    def __enter__(self) -> Poold:
        try:
            self.start()
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        try:
            if self.process is not None and self.process.poll() is None:
                self.terminate()
                code = self.wait_exit()
                assert code == 0 or exc is not None, f"poold ended with {code}:\n{self.log()}"
            left = self.left_over()
            if exc is None:
                assert not left, f"left over: {left}\n{self.log()}"
                assert "Traceback" not in self.log(), self.log()
        except BaseException:
            self._kill_group()
            raise
        finally:
            self._clean()

    def write_config(self, config: Config | None = None) -> None:
        """Write the file: the tests' own settings, the daemon's, and `config` over them."""
        sections: dict[str, dict[str, Any]] = {
            "daemon": {"state_dir": str(self.directory / "state"), "backend": self.backend, "log_format": "json"},
            "http": {"listen": ["127.0.0.1:0"], "socket": str(self.socket_path)},
            "docker": {"network": self.network},
        }
        for source in (self.config, config or {}):
            for section, keys in source.items():
                sections.setdefault(section, {}).update(keys)
        # Texts, numbers, truth values and lists of them are written alike in JSON and TOML.
        lines = []
        for section, keys in sections.items():
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
        self.config_path.write_text("\n".join(lines) + "\n")

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process and return at once."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DOCKER_")}
        if self.docker_host:
            environment["DOCKER_HOST"] = self.docker_host
        command = [sys.executable, "-m", "gateway.daemon", "--config", str(self.config_path)]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def start(self) -> None:
        """Start it, and wait until it answers."""
        if not self.config_path.exists():
            self.write_config()
        process = self.launch()
        client = Client(self.host, timeout_s=10)

        def answers() -> bool:
            assert process.poll() is None, f"poold ended with {process.returncode}:\n{self.log()}"
            with contextlib.suppress(ClientError):
                return bool(client.call("GET", "/healthz"))
            return False

        wait_until(answers, bool, what="poold to answer", timeout_s=60)
        addresses = [str(address) for address in self.status()["listen"]]
        self.port = next(int(text.rpartition(":")[2]) for text in addresses if text.startswith("http://"))

    def terminate(self) -> None:
        """SIGTERM."""
        self._running.terminate()

    def signal(self, number: signal.Signals) -> None:
        """Any signal."""
        self._running.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self._running.kill()
        self._running.wait(WAIT_S)

    def wait_exit(self, timeout_s: float = 60.0) -> int:
        """Its exit code, once it has ended."""
        return self._running.wait(timeout_s)

    def restart(self) -> None:
        """SIGTERM, and start again."""
        self.terminate()
        assert self.wait_exit() == 0, self.log()
        self.start()

    # --- functions ---

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """A management request. Raises RequestFailed."""
        return self._client.call(method, path, body=body)

    def upload(self, code: str | Path) -> str:
        """The digest of a code directory."""
        directory = FUNCTIONS / code if isinstance(code, str) else code
        with tempfile.TemporaryFile() as tar:
            write_tar(directory, tar)
            length = tar.tell()
            tar.seek(0)
            with self._client.request("PUT", "/v1/code", body=tar, length=length) as answer:
                if answer.status >= 400:
                    raise answer.failure()
                return str(answer.json()["digest"])

    def deploy(self, name: str, code: str | Path | None = "echo", *, wait: bool = True, **spec: Any) -> dict[str, Any]:
        """Deploy a directory of tests/functions (or, with `image`, none). Not on a network unless told."""
        query = f"?wait={str(wait).lower()}"
        body = {"name": name, "network": "none", "memory_mb": 64, "stop_grace_s": 0.2, **spec}
        if code is not None:
            query += f"&code={self.upload(code)}"
            body.setdefault("code", "code")
        result: dict[str, Any] = self.call("PUT", function_path(name) + query, body)
        return result

    def remove(self, name: str) -> None:
        """Remove a function."""
        self.call("DELETE", function_path(name))

    def info(self, name: str) -> dict[str, Any]:
        """Everything about a function."""
        found: dict[str, Any] = self.call("GET", function_path(name))
        return found

    def instances(self, name: str) -> list[dict[str, Any]]:
        """A function's instances, those of older revisions too."""
        found: list[dict[str, Any]] = self.call("GET", "/v1/instances")["instances"]
        return [one for one in found if one["function"] == name]

    def status(self) -> dict[str, Any]:
        """The daemon's state."""
        found: dict[str, Any] = self.call("GET", "/v1/status")
        return found

    def until(self, name: str, wanted: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """Until a function's instances are as wanted; them."""
        return wait_until(lambda: self.instances(name), wanted, what=f"{name}'s instances")

    def until_idle(self, name: str, count: int = 1, *states: str) -> list[dict[str, Any]]:
        """Until there are `count` instances, all idle or frozen (or in the given states)."""
        resting = states or ("idle", "frozen")
        return self.until(name, lambda found: len(found) == count and all(one["state"] in resting for one in found))

    def logs(self, name: str, query: str = "") -> list[dict[str, Any]]:
        """What a function has printed."""
        with self._client.stream("GET", f"{function_path(name, 'logs')}?tail=1000{query}") as answer:
            return list(answer.lines())

    def follow(self, name: str) -> Answer:
        """Follow its logs; a line that does not come within SILENCE_S is an error."""
        return self._client.request("GET", f"{function_path(name, 'logs')}?follow=1", timeout_s=SILENCE_S)

    # --- invocations ---

    def ask(
        self,
        name: str,
        path: str = "/",
        *,
        method: str | None = None,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Pass a request through to a function, on a connection of its own. An iterator is sent chunked."""
        method = method or ("GET" if body is None else "POST")
        return self.request(method, f"/fn/{name}{path}", body=body, headers=headers)

    def invoke(self, name: str, event: bytes = b"") -> Reply:
        """Invoke a function with an event."""
        return self.request("POST", function_path(name, "invoke"), body=event)

    def request(
        self,
        method: str,
        target: str,
        *,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Any request to the TCP address."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SILENCE_S)
        try:
            chunked = body is not None and not isinstance(body, bytes)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused early: the answer says why
                connection.request(method, target, body=body, headers=dict(headers or {}), encode_chunked=chunked)
            answer = connection.getresponse()
            found = {key.lower(): value for key, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        """A bare connection to the TCP address."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=SILENCE_S)

    def raw(self, data: bytes) -> bytes:
        """Send bytes, and read until the server closes."""
        with self.connect() as sock:
            sock.sendall(data)
            parts = []
            while part := sock.recv(65_536):
                parts.append(part)
        return b"".join(parts)

    # --- poolctl ---

    def ctl(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run poolctl to its end."""
        return subprocess.run(
            [sys.executable, "-m", "gateway.ctl", "-H", self.host, *arguments],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            timeout=60,
            check=False,
        )

    # --- looking at it ---

    def log(self) -> str:
        """What it has logged."""
        return (self.directory / "log").read_text(errors="replace")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one kind."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def rss_mb(self) -> float:
        """Its resident memory."""
        for line in Path(f"/proc/{self._running.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("no VmRSS")

    def containers(self) -> list[dict[str, Any]]:
        """Its containers, by the engine's own listing."""
        with self._engine() as client:
            filters = {"label": f"{LABEL_DAEMON}={self.daemon_id()}"}
            found: list[dict[str, Any]] = client.containers(all=True, filters=filters)
            return found

    def engine(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the docker SDK's low-level client."""
        with self._engine() as client:
            return getattr(client, method)(*arguments, **options)

    def daemon_id(self) -> str:
        """The identity in its state directory. Read from a copy: the daemon keeps the file to itself."""
        if not self._daemon_id:
            with tempfile.TemporaryDirectory() as copy:
                for file in (self.directory / "state").glob("poold.db*"):
                    shutil.copy(file, copy)
                with contextlib.closing(sqlite3.connect(Path(copy) / "poold.db")) as db:
                    row = db.execute("SELECT value FROM meta WHERE key='daemon_id'").fetchone()
            self._daemon_id = str(row[0])
        return self._daemon_id

    def left_over(self) -> list[str]:
        """What is left of it on this host: processes, cgroups, containers, networks, volumes, its socket."""
        left = [f"process {pid}: {command}" for pid, command in processes_of(self.directory)]
        if self.socket_path.exists():
            left.append(f"socket {self.socket_path}")
        if not (self.directory / "state/poold.db").exists():
            return left
        daemon_id = self.daemon_id()
        left += [f"cgroup {path}" for path in instance_cgroups(daemon_id)]
        if self.docker_host and self.backend != "process":
            label = {"label": f"{LABEL_DAEMON}={daemon_id}"}
            left += [f"container {one['Names']} {one['State']}" for one in self.containers()]
            left += [f"network {one['Name']}" for one in self.engine("networks", filters=label)]
            left += [f"volume {one['Name']}" for one in self.engine("volumes", filters=label)["Volumes"] or ()]
        return left

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    @contextlib.contextmanager
    def _engine(self) -> Iterator[Any]:
        client = docker.APIClient(base_url=self.docker_host, version="1.41", timeout=30)
        try:
            yield client
        finally:
            client.close()

    def _kill_group(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _clean(self) -> None:
        """Whatever the outcome of the test, leave nothing to the next."""
        self._kill_group()
        for pid, _ in processes_of(self.directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.docker_host and (self.directory / "state/poold.db").exists():
            with contextlib.suppress(docker.errors.DockerException), self._engine() as client:
                label = {"label": f"{LABEL_DAEMON}={self.daemon_id()}"}
                for one in client.containers(all=True, filters=label):
                    client.remove_container(one["Id"], force=True)
                for one in client.networks(filters=label):
                    client.remove_network(one["Id"])
        shutil.rmtree(self.directory, ignore_errors=True)
