"""The native management API: deploy, look at, steer and remove functions. Invocations are answered elsewhere."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import structlog
import trio

from gateway.apis import snapshot
from gateway.apis.course import Course
from gateway.apis.faults import spec_fault, translated, unknown_function
from gateway.apis.native_routes import table
from gateway.apis.sources import CodeStore, Daemon, DeployedFunction, Logs, Pools, Registry
from gateway.apis.views import (
    Checked,
    CodeStored,
    Deployed,
    Done,
    FunctionList,
    Health,
    InstanceList,
    LogEntry,
    ScaleRequest,
)
from gateway.errors import ApiError, ClientGone
from gateway.metrics import CONTENT_TYPE, Metrics, render
from gateway.openapi import document
from gateway.request import Request, Response
from gateway.router import NDJSON, Route, RouteFunction
from gateway.specfile import SpecError, parse_specs
from gateway.version import VERSION
from pool.logs import LogLine
from pool.spec import FunctionSpec

log = structlog.get_logger("poold.api")

SPEC_BYTES = 262_144
SMALL_BODY_BYTES = 65_536
CODE_BYTES = 1024 * 1024 * 1024
TAIL_LINES = 100
TAIL_MAX_LINES = 100_000
BATCH_LINES = 256  # log lines in one write
TRUE = frozenset(("1", "true", "yes", "on", ""))
FALSE = frozenset(("0", "false", "no", "off"))


class NativeApi:
    """The routes over the daemon's parts.

    `nursery` outlives every request: deployments that are followed run in it. `code_bytes` bounds an upload.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        dispatcher: Pools,
        codestore: CodeStore,
        logs: Logs,
        daemon: Daemon,
        metrics: Metrics,
        nursery: trio.Nursery,
        code_bytes: int = CODE_BYTES,
    ) -> None:
        self._registry = registry
        self._pools = dispatcher
        self._codestore = codestore
        self._logs = logs
        self._daemon = daemon
        self._metrics = metrics
        self._nursery = nursery
        self._code_bytes = code_bytes
        self._parsing = trio.CapacityLimiter(1)
        self._document: bytes | None = None

    def routes(self) -> list[Route]:
        """The table: what the router dispatches and the OpenAPI document describes."""
        return [
            replace(route, function=_guarded(route.function)) if route.function is not None else route
            for route in table(self)
        ]

    # --- deploying ---

    async def put_code(self, request: Request, params: dict[str, str]) -> Response:
        """PUT /v1/code: a tar of a code directory."""
        if request.length is not None and request.length > self._code_bytes:
            raise ApiError(413, "body_too_large", f"the code is larger than {self._code_bytes // 1_048_576} MB")
        with translated():
            digest = await self._codestore.add_tar(_Body(request), self._code_bytes)
        return answer(CodeStored(digest))

    async def put_function(self, request: Request, params: dict[str, str]) -> Response:
        """PUT /v1/functions/{name}: deploy; with Accept: application/x-ndjson its progress is streamed."""
        query = request.query_values()
        wait = flag(query, "wait", default=True)
        spec = await self._spec(request, params["name"])
        code = query.get("code") or None

        async def work(on_progress: Callable[[str], None]) -> Deployed:
            result = await self._registry.deploy(spec, code_digest=code, wait=wait, on_progress=on_progress)
            return Deployed(
                name=spec.name,
                revision=result.revision.id,
                digest=result.revision.artifact.digest,
                outcome=result.outcome,
                ready=result.ready,
                stages_s={stage: round(seconds, 6) for stage, seconds in result.stages.items()},
            )

        if NDJSON.encode() in (request.header(b"accept") or b""):
            course = Course(work)
            self._nursery.start_soon(course.run)
            return Response(200, course, NDJSON.encode())
        with translated(spec.name):
            return answer(await work(_unheard))

    async def check_specs(self, request: Request, params: dict[str, str]) -> Response:
        """POST /v1/specs/check: validate only."""
        specs = await self._specs(request)
        return answer(Checked([spec.name for spec in specs]))

    async def _spec(self, request: Request, name: str) -> FunctionSpec:
        specs = await self._specs(request)
        if len(specs) != 1:
            raise ApiError(
                400, "invalid_spec", f"one spec is needed, this is {len(specs)}", hint="PUT each by its name"
            )
        if specs[0].name != name:
            message = f"the path names {name!r}, the spec {specs[0].name!r}"
            raise ApiError(400, "invalid_spec", message, hint="they must be the same")
        return specs[0]

    async def _specs(self, request: Request) -> list[FunctionSpec]:
        body = await request.read(SPEC_BYTES)
        try:
            text = body.decode()
        except UnicodeDecodeError as exc:
            raise ApiError(400, "invalid_spec", f"the spec is not UTF-8 (byte {exc.start})") from exc
        try:
            # A thread, because YAML is slow enough to be felt by whoever invokes meanwhile.
            return await trio.to_thread.run_sync(parse_specs, text, "request body", limiter=self._parsing)
        except SpecError as exc:
            raise spec_fault(exc) from exc

    # --- looking ---

    async def list_functions(self, request: Request, params: dict[str, str]) -> Response:
        """GET /v1/functions."""
        return answer(FunctionList(snapshot.rows(self._registry.list(), self._pools, self._metrics)))

    async def get_function(self, request: Request, params: dict[str, str]) -> Response:
        """GET /v1/functions/{name}."""
        return answer(snapshot.function_info(self._known(params), self._pools, self._metrics))

    async def list_instances(self, request: Request, params: dict[str, str]) -> Response:
        """GET /v1/instances."""
        return answer(InstanceList(snapshot.instances(self._pools)))

    async def get_status(self, request: Request, params: dict[str, str]) -> Response:
        """GET /v1/status."""
        return answer(snapshot.status(self._daemon, self._registry, self._pools, self._metrics))

    async def get_logs(self, request: Request, params: dict[str, str]) -> Response:
        """GET /v1/functions/{name}/logs: ndjson."""
        name = self._known(params).name
        query = request.query_values()
        tail = number(query, "tail", TAIL_LINES, TAIL_MAX_LINES)
        instance, invocation = query.get("instance") or None, query.get("invocation") or None
        follow = flag(query, "follow", default=False)
        lines = self._follow if follow else self._kept
        return Response(200, lines(name, tail, instance, invocation), NDJSON.encode())

    async def get_journal(self, request: Request, params: dict[str, str]) -> Response:
        """GET /v1/journal."""
        return Response(200, await self._pools.journal(), b"application/octet-stream")

    async def get_health(self, request: Request, params: dict[str, str]) -> Response:
        """GET /healthz."""
        return answer(Health("draining" if self._daemon.draining else "ok"))

    async def get_metrics(self, request: Request, params: dict[str, str]) -> Response:
        """GET /metrics."""
        self._forget_counters()
        functions = snapshot.gauges(self._registry.list(), self._pools)
        host = snapshot.host_gauges(self._daemon, self._pools)
        return Response(200, render(self._metrics, functions, host), CONTENT_TYPE)

    async def get_document(self, request: Request, params: dict[str, str]) -> Response:
        """GET /v1/openapi.json."""
        if self._document is None:
            self._document = msgspec.json.encode(document(self.routes(), version=VERSION))
        return Response(200, self._document)

    # --- steering ---

    async def delete_function(self, request: Request, params: dict[str, str]) -> Response:
        """DELETE /v1/functions/{name}."""
        name = self._known(params).name
        with translated(name):
            await self._registry.remove(name)
        self._forget_counters()
        return answer(Done(name=name, message="removed"))

    async def scale_function(self, request: Request, params: dict[str, str]) -> Response:
        """POST /v1/functions/{name}/scale."""
        function = self._known(params)
        try:
            wanted = msgspec.json.decode(await request.read(SMALL_BODY_BYTES), type=ScaleRequest)
        except msgspec.DecodeError as exc:
            hint = 'send {"min": 1, "max": 10}, or one of them'
            raise ApiError(400, "invalid_scale", f"not a valid request: {exc}", hint=hint) from exc
        check_scale(wanted, function.spec)
        with translated(function.name):
            await self._registry.scale(function.name, wanted.min, wanted.max)
        return answer(Done(name=function.name, message="scaled"))

    async def recycle_function(self, request: Request, params: dict[str, str]) -> Response:
        """POST /v1/functions/{name}/recycle."""
        name = self._known(params).name
        self._registry.recycle(name)
        return answer(Done(name=name, message="its instances are being replaced"))

    async def reset_function(self, request: Request, params: dict[str, str]) -> Response:
        """POST /v1/functions/{name}/reset."""
        function = self._known(params)
        self._pools.reset_breaker(function.revision.id)
        return answer(Done(name=function.name, message="it may start again"))

    async def drain(self, request: Request, params: dict[str, str]) -> Response:
        """POST /v1/drain."""
        self._daemon.drain()
        return answer(Done(message="draining"), 202)

    # --- pieces ---

    def _forget_counters(self) -> None:
        self._metrics.keep_only(one.name for one in self._registry.list())

    def _known(self, params: dict[str, str]) -> DeployedFunction:
        found = self._registry.get(params["name"])
        if found is None:
            raise unknown_function(params["name"])
        return found

    async def _kept(self, name: str, tail: int, instance: str | None, invocation: str | None) -> AsyncIterator[bytes]:
        lines = self._logs.tail(name, tail, instance=instance, invocation=invocation)
        for start in range(0, len(lines), BATCH_LINES):
            yield _entries(lines[start : start + BATCH_LINES])
            await trio.lowlevel.checkpoint()

    async def _follow(self, name: str, tail: int, instance: str | None, invocation: str | None) -> AsyncIterator[bytes]:
        with self._logs.subscribe(name) as follower:
            kept = self._logs.tail(name, tail, instance=instance, invocation=invocation)
            if kept:
                yield _entries(kept)
            told = 0
            async for first in follower.lines:
                batch = [first]
                while len(batch) < BATCH_LINES:
                    try:
                        batch.append(follower.lines.receive_nowait())
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                wanted = [
                    line
                    for line in batch
                    if (instance is None or line.instance == instance)
                    and (invocation is None or line.invocation == invocation)
                ]
                if wanted:
                    dropped, told = follower.missed - told, follower.missed
                    yield _entries(wanted, dropped)


class _Body:
    """A request's body from its first byte."""

    def __init__(self, request: Request) -> None:
        self._first = request.body
        self._stream = request.stream

    async def receive(self) -> bytes:
        """See BodySource.receive."""
        if self._first:
            first, self._first = self._first, b""
            return first
        return await self._stream.receive() if self._stream is not None else b""


def _guarded(function: RouteFunction) -> RouteFunction:
    """A fault in one route must not end the daemon under the functions that run."""

    async def guarded(request: Request, params: dict[str, str]) -> Response:
        try:
            return await function(request, params)
        except (ApiError, ClientGone):
            raise
        except Exception as exc:
            log.exception("a route failed unexpectedly", method=request.method.decode(), path=request.path.decode())
            raise ApiError(500, "internal", "an error inside poold", hint="its log has the details") from exc

    return guarded


def answer(value: object, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(status, msgspec.json.encode(value) + b"\n")


def flag(query: dict[str, str], name: str, *, default: bool) -> bool:
    """A yes or no of the query. Raises ApiError 400."""
    value = query.get(name)
    if value is None:
        return default
    if value.lower() in TRUE or value.lower() in FALSE:
        return value.lower() in TRUE
    raise ApiError(400, "invalid_query", f"{name} is true or false, not {value!r}")


def number(query: dict[str, str], name: str, default: int, most: int) -> int:
    """A whole number of the query, from 0. Raises ApiError 400."""
    value = query.get(name)
    if value is None:
        return default
    if not value.isdecimal() or len(value) > 9 or int(value) > most:
        raise ApiError(400, "invalid_query", f"{name} is a whole number from 0 to {most}, not {value!r}")
    return int(value)


def check_scale(wanted: ScaleRequest, spec: FunctionSpec) -> None:
    """Raises ApiError 400 for a floor and ceiling that cannot be."""
    floor = spec.pool.min if wanted.min is None else wanted.min
    ceiling = spec.pool.max if wanted.max is None else wanted.max
    if wanted.min is None and wanted.max is None:
        raise ApiError(400, "invalid_scale", "neither min nor max is given", hint='send {"min": 1, "max": 10}')
    if not 0 <= floor <= 1000 or not 1 <= ceiling <= 1000:
        raise ApiError(400, "invalid_scale", f"min is 0 to 1000 and max 1 to 1000; this is {floor} and {ceiling}")
    if floor > ceiling:
        hint = "give both" if wanted.min is None or wanted.max is None else ""
        raise ApiError(400, "invalid_scale", f"min ({floor}) is larger than max ({ceiling})", hint=hint)


def _entries(lines: list[LogLine], dropped: int = 0) -> bytes:
    parts = []
    for line in lines:
        at = datetime.fromtimestamp(line.at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = LogEntry(
            at=at,
            instance=line.instance,
            invocation=line.invocation,
            stream="stderr" if line.stream.name == "STDERR" else "stdout",
            text=line.text,
            dropped=dropped,
        )
        parts.append(msgspec.json.encode(entry))
        dropped = 0
    return b"".join(part + b"\n" for part in parts)


def _unheard(_text: str) -> None:
    """Nobody follows this deployment."""
