"""Which request goes where: invocations first and by the shortest way, then the table of routes."""

from __future__ import annotations

from urllib.parse import unquote

import structlog
import trio

from gateway.config import HttpSection
from gateway.connection import Connection, RequestBody
from gateway.errors import ApiError
from gateway.invoke import Invoker
from gateway.registry import Function, Registry
from gateway.request import Request
from gateway.router import NoMatch, Router
from pool.contracts.base import Call

log = structlog.get_logger("poold.access")

PASS_THROUGH = b"/fn/"
FUNCTIONS = b"/v1/functions/"
INVOKE = b"/invoke"


class App:
    """Answers requests."""

    def __init__(self, registry: Registry, invoker: Invoker, router: Router) -> None:
        self._routes = registry.routes
        self._invoker = invoker
        self._router = router
        self._admin_on_tcp = False
        self._log_requests = False

    def configure(self, http: HttpSection) -> None:
        """Take what a reload may change: who may administer, and whether each request is logged."""
        self._admin_on_tcp = http.admin_on_tcp
        self._log_requests = http.access_log

    async def answer(self, request: Request, connection: Connection) -> None:
        """Answer one request on its connection. Raises ApiError, ClientGone."""
        if self._log_requests:
            await self._answer_logged(request, connection)
        else:
            await self._answer(request, connection)

    async def _answer_logged(self, request: Request, connection: Connection) -> None:
        began_s = trio.current_time()
        status = 499  # what nginx calls it when the client went first
        try:
            await self._answer(request, connection)
            status = connection.status
        except ApiError as exc:
            status = exc.status
            raise
        finally:
            log.info(
                "request",
                method=request.method.decode("ascii", "replace"),
                target=request.target.decode("ascii", "replace"),
                client=request.client_ip.decode() or "unix",
                status=status,
                start=connection.start_kind or None,
                took_ms=round((trio.current_time() - began_s) * 1000, 3),
            )

    async def _answer(self, request: Request, connection: Connection) -> None:
        path = request.path
        if path.startswith(PASS_THROUGH):
            await self._pass_through(request, connection)
        elif path.startswith(FUNCTIONS) and path.endswith(INVOKE) and path.count(b"/") == 4:
            await self._invoke(request, connection)
        else:
            await self._route(request, connection)

    async def _pass_through(self, request: Request, connection: Connection) -> None:
        path = request.path
        end = path.find(b"/", 4)
        if end < 0:
            end = len(path)
        function = self._function(path[4:end])
        target = request.target[end:]
        if not target.startswith(b"/"):
            target = b"/" + target
        call = Call(
            self._invoker.new_id(),
            request.method,
            target,
            request.headers,
            request.body,
            self._body(request, function),
            request.length,
            False,
            path[:end],
            request.client_ip,
        )
        await self._invoker.answer(function, call, connection)

    async def _invoke(self, request: Request, connection: Connection) -> None:
        if request.method != b"POST":
            raise ApiError(405, "method_not_allowed", "invoke takes POST; its body is the event")
        function = self._function(request.path[len(FUNCTIONS) : -len(INVOKE)])
        call = Call(
            self._invoker.new_id(),
            b"POST",
            function.spec.web.invoke_path.encode("ascii", "replace"),
            request.headers,
            request.body,
            self._body(request, function),
            request.length,
            True,
            b"",
            request.client_ip,
        )
        await self._invoker.answer(function, call, connection)

    def _function(self, name: bytes) -> Function:
        function = self._routes.get(name)
        if function is None:
            text = unquote(name.decode("ascii", "replace"))
            function = self._routes.get(text.encode()) if text else None
            if function is None:
                known = ", ".join(sorted(key.decode() for key in self._routes)[:10]) or "none"
                message = f"no function is called {text!r}" if text else "the path names no function"
                raise ApiError(404, "function_not_found", message, hint=f"deployed are: {known}")
        if function.problem:
            raise ApiError(503, "function_broken", f"{function.name}: {function.problem}", hint="deploy it again")
        return function

    def _body(self, request: Request, function: Function) -> RequestBody | None:
        """The rest of the body within the function's limit. Raises ApiError 413."""
        limit_bytes = function.spec.max_body_mb * 1_048_576
        if len(request.body) > limit_bytes or (request.length or 0) > limit_bytes:
            raise ApiError(413, "body_too_large", f"{function.name} takes bodies up to {limit_bytes} bytes")
        stream = request.stream
        if stream is None:
            return None
        assert isinstance(stream, RequestBody)
        stream.limit(limit_bytes - len(request.body))
        return stream

    async def _route(self, request: Request, connection: Connection) -> None:
        found = self._router.match(request.method, request.path)
        if isinstance(found, NoMatch):
            await connection.respond(found.response(request.method, request.path))
            return
        route = found.route
        if route.admin and not (request.trusted or self._admin_on_tcp):
            raise ApiError(
                403,
                "admin_refused",
                "this address takes invocations only",
                hint="administer by the Unix socket (poolctl does), or set admin_on_tcp = true under [http]",
            )
        assert route.function is not None
        await connection.respond(await route.function(request, found.params))
