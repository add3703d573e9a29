"""Fakes of the daemon's parts behind the management routes, with the real shapes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from gateway.apis.native import NativeApi
from gateway.errors import ApiError
from gateway.metrics import Metrics
from gateway.request import Request, Response
from gateway.router import NoMatch, Router
from pool.contracts.base import BodySource
from pool.errors import PoolError
from pool.instance import Instance
from pool.logbook import LogBook
from pool.spec import Artifact, FunctionSpec, Revision, make_revision
from scheduler.breaker import BreakerState
from scheduler.model import InstanceState, RejectReason, StartKind
from scheduler.stats import HostStats, InstanceView, RevisionStats


@dataclass
class FakeFunction:
    """A deployed function."""

    spec: FunctionSpec
    revision: Revision
    deployed_at_s: float = 1_795_292_520.0
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass
class FakeResult:
    """What a deploy came to."""

    revision: Revision
    outcome: Literal["created", "updated", "unchanged"] = "created"
    ready: bool = True
    stages: dict[str, float] = field(default_factory=dict)


class FakeRegistry:
    """Functions in a dict; `failure` is raised by the next deploy, `gate` holds it."""

    def __init__(self) -> None:
        self.functions: dict[str, FakeFunction] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.failure: Exception | None = None
        self.gate: trio.Event | None = None
        self.cancelled = trio.Event()

    def add(self, name: str = "hello", **more: Any) -> FakeFunction:
        spec = FunctionSpec(name=name, image="demo:1", **more)
        self.functions[name] = FakeFunction(spec, make_revision(spec, Artifact(digest="sha256:1", image="demo:1")))
        return self.functions[name]

    async def deploy(
        self,
        spec: FunctionSpec,
        *,
        code_digest: str | None = None,
        wait: bool = True,
        on_progress: Callable[[str], None] | None = None,
    ) -> FakeResult:
        self.calls.append(("deploy", spec, code_digest, wait))
        if on_progress is not None:
            on_progress("pulling demo:1")
        if self.gate is not None:
            try:
                await self.gate.wait()
            except trio.Cancelled:
                self.cancelled.set()
                raise
        if self.failure is not None:
            raise self.failure
        if on_progress is not None:
            on_progress("starting 1 instance")
        return FakeResult(make_revision(spec, Artifact(digest="sha256:1")), ready=wait)

    async def remove(self, name: str) -> None:
        del self.functions[name]

    async def scale(self, name: str, min_instances: int | None, max_instances: int | None) -> None:
        self.calls.append(("scale", name, min_instances, max_instances))

    def recycle(self, name: str) -> None:
        self.calls.append(("recycle", name))

    def get(self, name: str) -> FakeFunction | None:
        return self.functions.get(name)

    def list(self) -> Sequence[FakeFunction]:
        return list(self.functions.values())


@dataclass
class FakePools:
    """The dispatcher's views."""

    views: list[InstanceView] = field(default_factory=list)
    breaker: BreakerState = BreakerState.CLOSED
    until: float | None = None
    resets: list[str] = field(default_factory=list)

    def stats(self, revision_id: str) -> RevisionStats:
        mine = [view for view in self.views if view.revision == revision_id]
        return RevisionStats(
            revision=revision_id,
            function=revision_id.split("@")[0],
            tenant="default",
            removed=False,
            min_instances=1,
            max_instances=10,
            slots=1,
            memory_mb=256 * len(mine),
            instances={state: sum(view.state is state for view in mine) for state in InstanceState},
            queued=3,
            running=1,
            free_slots=0,
            starts_in_flight=0,
            breaker=self.breaker,
            breaker_failures=4,
            breaker_until=self.until,
            breaker_detail="exit code 3",
            totals=dict.fromkeys(StartKind, 0),
            rejections={RejectReason.QUEUE_FULL: 1},
            start_s=0.2,
            service_s=None,
            thaw_s=0.0001,
        )

    def host_stats(self) -> HostStats:
        return HostStats(
            revisions=1,
            instances=len(self.views),
            running=1,
            queued=3,
            max_concurrency=1000,
            reserved=0,
            memory_mb=4096,
            memory_charged_mb=512,
            memory_freeing_mb=0,
            starts_in_flight=1,
            max_starts=2,
            starts_wanted=0,
            tenants={},
            backend_down=None,
            draining=False,
        )

    def instances(self, revision_id: str | None = None) -> Sequence[InstanceView]:
        return [view for view in self.views if revision_id in (None, view.revision)]

    def find_instance(self, instance_id: str) -> Instance | None:
        return None

    def reset_breaker(self, revision_id: str) -> None:
        self.resets.append(revision_id)

    async def journal(self) -> bytes:
        return b"\x93journal"


class FakeCodeStore:
    """Reads what it is given."""

    def __init__(self) -> None:
        self.data = b""
        self.failure: PoolError | None = None

    async def add_tar(self, source: BodySource, limit_bytes: int) -> str:
        while part := await source.receive():
            self.data += part
        if self.failure is not None:
            raise self.failure
        return "sha256:code"


class FakeDaemon:
    """The daemon's own state."""

    backend_name = "simulated"
    backend_reason = "asked for"
    isolation = "nothing runs"
    engine: dict[str, str] = {"version": "1"}  # noqa: RUF012 - a fake's constant
    engine_problem: str | None = None
    listen = ("http://127.0.0.1:1",)
    uptime_s = 12.5
    draining = False

    def warnings(self) -> Sequence[str]:
        return ["be careful"]

    def drain(self) -> None:
        self.draining = True


class Parts:
    """The API over fakes, called by method and target."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.registry = FakeRegistry()
        self.pools = FakePools()
        self.codestore = FakeCodeStore()
        self.logs = LogBook()
        self.daemon = FakeDaemon()
        self.metrics = Metrics()
        self.api = NativeApi(
            registry=self.registry,
            dispatcher=self.pools,
            codestore=self.codestore,
            logs=self.logs,
            daemon=self.daemon,
            metrics=self.metrics,
            nursery=nursery,
            code_bytes=1000,
        )
        self.router = Router(self.api.routes())

    async def call(self, method: str, target: str, body: bytes = b"", **headers: str) -> Response:
        raw = target.encode()
        path, _, query = raw.partition(b"?")
        found = self.router.match(method.encode(), path)
        if isinstance(found, NoMatch):
            return found.response(method.encode(), path)
        assert found.route.function is not None
        sent = [(name.encode(), value.encode()) for name, value in headers.items()]
        request = Request(method.encode(), raw, path, query, sent, body=body, length=len(body))
        try:
            return await found.route.function(request, found.params)
        except ApiError as exc:
            return Response(exc.status, exc.body())

    async def ask(self, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """The status and the decoded JSON."""
        response = await self.call(method, target, body, **headers)
        assert isinstance(response.body, bytes)
        return response.status, json.loads(response.body)


def fake_view(number: int, revision: str, state: InstanceState = InstanceState.IDLE, **more: Any) -> InstanceView:
    values: dict[str, Any] = {
        "id": f"3-{number:x}",
        "revision": revision,
        "function": revision.split("@")[0],
        "state": state,
        "leases": 0,
        "slots": 1,
        "uses": 7,
        "started_at": trio.current_time() - 10 + number,
        "ready_at": None,
        "idle_since": trio.current_time() - 2,
        "charged_mb": 256,
        "memory_mb": 20.04,
        "awaited": False,
        "doomed": None,
    }
    return InstanceView(**(values | more))
