"""A daemon of canned answers on a Unix socket, for the client's tests: its shapes are the API's own types."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from gateway.apis import views
from pool.spec import FunctionSpec, PoolSpec
from scheduler.model import InstanceState


@dataclass(slots=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Canned:
    """One answer. A body that is an iterable is sent chunked, as it comes."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: list[tuple[str, str]] = field(default_factory=list)


Answering = Callable[[Seen], Canned]


def canned(value: Any, status: int = 200) -> Canned:
    """A JSON answer."""
    return Canned(status, msgspec.json.encode(value), [("Content-Type", "application/json")])


def ndjson(*values: Any) -> Canned:
    """A streamed answer."""
    return Canned(200, [msgspec.json.encode(value) + b"\n" for value in values])


def failing(status: int, code: str, message: str, **more: Any) -> Canned:
    """An error of the daemon's own."""
    return canned({"error": {"code": code, "message": message, **more}}, status)


class FakeDaemon:
    """Answers by (method, path); everything else is 404. `seen` keeps the requests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.host = f"unix://{path}"
        self.seen: list[Seen] = []
        self.answers: dict[tuple[str, str], Canned | Answering] = {}

    def on(self, method: str, path: str, answer: Canned | Answering) -> None:
        """Answer these requests so."""
        self.answers[method, path] = answer

    def find(self, seen: Seen) -> Canned:
        """The answer to a request."""
        self.seen.append(seen)
        found = self.answers.get((seen.method, seen.path))
        if found is None:
            return failing(404, "function_not_found", f"nothing at {seen.path}", hint="look elsewhere")
        return found if isinstance(found, Canned) else found(seen)


@contextmanager
def running(path: Path) -> Iterator[FakeDaemon]:
    """A fake daemon that answers on a socket at `path`."""
    daemon = FakeDaemon(path)

    class Answerer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: Any) -> None:
            return

        def _any(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = daemon.find(Seen(self.command, parts.path, query, headers, self._read_body()))
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            if isinstance(answer.body, bytes):
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for part in answer.body:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")

        def _read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", "0")))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            return  # a client that went away on purpose

    with Server(str(path), Answerer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield daemon
        finally:
            server.shutdown()
            thread.join()


# --- answers of the API's own types -----------------------------------------------------------------------


def instance_info(number: int = 1, **more: Any) -> views.InstanceInfo:
    """An idle instance of hello."""
    values: dict[str, Any] = {
        "id": f"3-{number:x}",
        "function": "hello",
        "revision": "hello@0123456789ab",
        "state": InstanceState.IDLE,
        "slots": 1,
        "used": 0,
        "uses": 12,
        "age_s": 3723.4,
        "idle_s": 65.0,
        "pid": 4242,
        "memory_mb": 23.4,
    }
    return views.InstanceInfo(**(values | more))


def function_row(name: str = "hello", **more: Any) -> views.FunctionRow:
    """A function with a pool of three."""
    values: dict[str, Any] = {
        "name": name,
        "state": "ready",
        "revision": f"{name}@0123456789ab",
        "contract": "web",
        "runs": "code",
        "min": 1,
        "max": 10,
        "instances": views.InstanceCounts(idle=1, frozen=2),
        "queued": 0,
        "running": 0,
        "totals": views.StartTotals(warm=12_345, thawed=20, prewarmed=3, cold=1),
        "errors": 2,
        "rejected": 0,
    }
    return views.FunctionRow(**(values | more))


def function_info(name: str = "hello", **more: Any) -> views.FunctionInfo:
    """The same function in full."""
    row = msgspec.structs.asdict(function_row(name))
    values: dict[str, Any] = {
        "digest": "sha256:0123456789abcdef",
        "deployed_at": "2026-11-21T20:22:00Z",
        "description": "says hello",
        "spec": FunctionSpec(name=name, code=".", pool=PoolSpec(min=1)),
        "breaker": views.Breaker(),
        "estimates": {"start_s": 0.212, "run_s": 0.0011},
        "rejected_by_reason": {},
        "instance_list": [instance_info(1), instance_info(2, state=InstanceState.FROZEN)],
    }
    return views.FunctionInfo(**(row | values | more))


def status_info(**more: Any) -> views.Status:
    """A daemon that is well."""
    values: dict[str, Any] = {
        "version": "0.1.0",
        "backend": "docker",
        "isolation": "containers of Docker Engine, each in namespaces of its own",
        "engine": {"version": "20.10.24", "api": "1.41"},
        "engine_problem": None,
        "backend_reason": "Docker Engine answers",
        "listen": ["http://127.0.0.1:7070", "unix:///run/poold/poold.sock"],
        "pid": 4711,
        "uptime_s": 7384.0,
        "draining": False,
        "functions": 1,
        "instances": views.InstanceCounts(idle=1, frozen=2),
        "memory": views.MemoryInfo(charged_mb=768, limit_mb=4096),
        "running": 0,
        "max_concurrency": 1000,
        "queued": 0,
        "starts_in_flight": 0,
        "max_starts": 2,
        "totals": views.StartTotals(warm=12_345, thawed=20, prewarmed=3, cold=1),
        "errors": 2,
        "rejected": 0,
        "breakers": [],
        "warnings": [],
    }
    return views.Status(**(values | more))
