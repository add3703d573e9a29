"""The backends as the contract suite sees them: how to open one, and what it has left behind."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import docker
import psutil
import trio

from pool.backends.base import Backend, Output, Running, StartRequest
from pool.backends.docker import DockerBackend
from pool.backends.process import ProcessBackend
from pool.backends.simulated import SimulatedBackend
from pool.channel import Channel
from pool.errors import ChannelClosed
from pool.instance_cgroup import Parents
from pool.spec import FunctionSpec, Revision, make_revision

PORT = 8080
# An HTTP echo that understands the same x-sim- headers as the simulated backend, as far as the suite uses them.
BOOTSTRAP = """#!/usr/bin/python3 -SE
import json, os, signal, socket, sys, time

MODE = os.environ.get("MODE", "")
print("started", flush=True)
if MODE == "exits":
    print("giving up", file=sys.stderr, flush=True)
    sys.exit(3)
if MODE == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif MODE == "polite":
    def bye(*_):
        os.write(1, b"bye\\n")
        os._exit(0)
    signal.signal(signal.SIGTERM, bye)
if MODE == "asks":
    while True:
        try:
            conn = socket.create_connection(("127.0.0.1", 9001))
            break
        except OSError:
            time.sleep(0.005)
    conn.sendall(b"what next?")
    print("told:", conn.recv(100).decode(), flush=True)
if MODE == "leaves children":
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)


def facts():
    def writes(path):
        try:
            with open(path, "w"):
                return True
        except OSError:
            return False
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    paths = ("/here", "/code/here", "/usr/here", "/etc/here", "/tmp/here")
    return json.dumps({
        "user": os.getuid(), "env": dict(os.environ), "directory": os.getcwd(),
        "capabilities": status["CapEff"].strip(), "no_new_privileges": status["NoNewPrivs"].strip(),
        "writable": [path for path in paths if writes(path)],
        "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
        "interfaces": [name for _, name in socket.if_nameindex()],
    }).encode()


listener = socket.create_server(("0.0.0.0", int(os.environ["PORT"])), backlog=16)
while True:
    file = listener.accept()[0].makefile("rwb")
    while line := file.readline():
        headers = {}
        while (header := file.readline()) != b"\\r\\n":
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = file.read(int(headers.get("content-length", 0)))
        if line.split()[1] == b"/facts":
            body = facts()
        if "x-sim-print" in headers:
            print(headers["x-sim-print"], flush=True)
        if "x-sim-die" in headers:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        file.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
        file.flush()
"""


@dataclass
class Printed:
    """What an instance has printed; a test waits for the text it needs."""

    text: dict[Output, bytes] = field(default_factory=lambda: {Output.STDOUT: b"", Output.STDERR: b""})
    _more: trio.Event = field(default_factory=trio.Event)

    def __call__(self, output: Output, data: bytes) -> None:
        self.text[output] += data
        self._more.set()
        self._more = trio.Event()

    async def has(self, text: bytes, output: Output = Output.STDOUT) -> None:
        """Wait until it has printed that."""
        with trio.fail_after(20):
            while text not in self.text[output]:
                await self._more.wait()


class Kind(Protocol):
    """One backend under test."""

    name: str

    def open(self) -> Backend: ...

    def leftovers(self) -> list[str]:
        """What exists of its instances, outside of it. Blocking."""


class SimulatedKind:
    name = "simulated"

    def __init__(self) -> None:
        self.backend = SimulatedBackend(1, start_s=0.01)

    def open(self) -> Backend:
        return self.backend  # entering it again stands for a new daemon

    def leftovers(self) -> list[str]:
        return [*self.backend.instances] + ["live"] * self.backend.counts.live


class ProcessKind:
    name = "process"

    def __init__(self, daemon_id: str, tmp_path: Path) -> None:
        self.daemon_id = daemon_id
        self.state_dir = tmp_path / "state"

    def open(self) -> Backend:
        return ProcessBackend(self.daemon_id, self.state_dir)

    def leftovers(self) -> list[str]:
        found = [*Parents.find().named(f"poold:{self.daemon_id}:")]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("DAEMON") == self.daemon_id:
                    found.append(f"process {process.pid}")
        found += [f"child {child.pid}" for child in psutil.Process().children() if child.name() in ("bwrap", "unshare")]
        return found


class DockerKind:
    name = "docker"

    def __init__(self, daemon_id: str, tmp_path: Path, host: str) -> None:
        self.daemon_id = daemon_id
        self.host = host
        self.state_dir = tmp_path / "state"

    def open(self) -> Backend:
        return DockerBackend(self.daemon_id, self.state_dir, docker_host=self.host)

    def leftovers(self) -> list[str]:
        with contextlib.closing(docker.DockerClient(base_url=self.host)) as client:
            found = client.containers.list(all=True, ignore_removed=True)
            return [str(c.name) for c in found if self.daemon_id in str(c.labels)]

    async def clean(self) -> None:
        """Remove what its daemon keeps beyond its instances: the network, the base image."""
        async with DockerBackend(self.daemon_id, self.state_dir, docker_host=self.host) as backend:
            await backend.cleanup()


def make_code(tmp_path: Path, text: str = BOOTSTRAP) -> Path:
    """A code directory that every user may read."""
    code = tmp_path / "code"
    code.mkdir(exist_ok=True)
    code.chmod(0o755)
    (code / "bootstrap").write_text(text)
    (code / "bootstrap").chmod(0o755)
    return code


async def make(backend: Backend, code: Path, **spec: object) -> Revision:
    """A revision of the code."""
    values: dict[str, object] = {"name": "f", "code": str(code), "memory_mb": 64, **spec}
    function = FunctionSpec(**values)  # type: ignore[arg-type]  # the suite's own keywords
    return make_revision(function, await backend.resolve(function, str(code), lambda line: None))


def request(revision: Revision, instance_id: str = "i1", printed: Printed | None = None, **env: str) -> StartRequest:
    """A request to start an instance of it."""
    return StartRequest(
        instance_id=instance_id,
        revision=revision,
        env={"PORT": str(PORT), **env},
        port=PORT,
        on_output=printed or Printed(),
    )


async def connect(running: Running) -> Channel:
    """Dial until the code listens."""
    with trio.fail_after(20):
        while True:
            try:
                return await running.dial(PORT)
            except ChannelClosed:
                assert running.exited is None, running.exited
                await trio.sleep(0.005)


async def ask(channel: Channel, body: bytes = b"", *headers: str, path: str = "/") -> None:
    """Send a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: instance", f"Content-Length: {len(body)}", *headers, "", ""]
    await channel.send_all("\r\n".join(lines).encode() + body)


async def answer(channel: Channel) -> bytes:
    """The body of the next answer."""
    data = b""
    with trio.fail_after(20):
        while b"\r\n\r\n" not in data:
            data += await _some(channel)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        while len(body) < length:
            body += await _some(channel)
    assert head.startswith(b"HTTP/1.1 200 ")
    return body


async def _some(channel: Channel) -> bytes:
    data = await channel.receive()
    assert data, "the stream ended in the middle of an answer"
    return data
