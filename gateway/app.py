"""Which request goes where: invocations first and by the shortest way, then the table of routes."""

from __future__ import annotations

from collections.abc import Awaitable
from urllib.parse import unquote

import structlog
import trio

from gateway.bodies import RequestBody
from gateway.config import HttpSection
from gateway.connection import Connection
from gateway.errors import ApiError
from gateway.invoke import Invoker
from gateway.registry import Function, Registry
from gateway.request import Request
from gateway.router import NoMatch, Router
from pool.contracts.base import Call
from pool.wire.http1 import RequestMessage

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

    def answer(self, message: RequestMessage, connection: Connection) -> Awaitable[None]:
        """Answer one request on its connection. Raises ApiError, ClientGone, here or when awaited.

        No coroutine of its own: on the invocation path each one is run through at every step.
        """
        if self._log_requests:
            return self._answer_logged(message, connection)
        return self._find(message, connection)

    def _find(self, message: RequestMessage, connection: Connection) -> Awaitable[None]:
        target = message.target
        if target.startswith(PASS_THROUGH):
            return self._pass_through(message, connection)
        if target.startswith(FUNCTIONS):
            path = target.partition(b"?")[0]
            if path.endswith(INVOKE) and path.count(b"/") == 4:
                return self._invoke(path, message, connection)
        if target.lower().startswith(b"http://"):  # the form for proxies, RFC 9112 section 3.2.2
            message.target = b"/" + target[7:].partition(b"/")[2]
            return self._find(message, connection)
        return self._route(message, connection)

    async def _answer_logged(self, message: RequestMessage, connection: Connection) -> None:
        began_s = trio.current_time()
        status = 499  # what nginx calls it when the client went first
        try:
            await self._find(message, connection)
            status = connection.status
        except ApiError as exc:
            status = exc.status
            raise
        finally:
            log.info(
                "request",
                method=message.method.decode("ascii", "replace"),
                target=message.target.decode("ascii", "replace"),
                client=connection.client_ip.decode() or "unix",
                status=status,
                start=connection.start_kind or None,
                took_ms=round((trio.current_time() - began_s) * 1000, 3),
            )

    def _pass_through(self, message: RequestMessage, connection: Connection) -> Awaitable[None]:
        whole = message.target
        cut = whole.find(b"/", 4)
        asked = whole.find(b"?", 4)
        if asked >= 0 and (cut < 0 or asked < cut):
            cut = asked  # a query right after the name
        if cut < 0:
            base, target = whole, b"/"
        else:
            base, target = whole[:cut], whole[cut:] if cut != asked else b"/" + whole[cut:]
        function = self._function(base[4:])
        call = Call(
            self._invoker.new_id(),
            message.method,
            target,
            message.headers,
            message.body,
            None if message.done and not message.body else self._body(message, connection, function),
            message.length,
            False,
            base,
            connection.client_ip,
        )
        return self._invoker.answer(function, call, connection)

    def _invoke(self, path: bytes, message: RequestMessage, connection: Connection) -> Awaitable[None]:
        if message.method != b"POST":
            raise ApiError(405, "method_not_allowed", "invoke takes POST; its body is the event")
        function = self._function(path[len(FUNCTIONS) : -len(INVOKE)])
        call = Call(
            self._invoker.new_id(),
            b"POST",
            function.spec.web.invoke_path.encode("ascii", "replace"),
            message.headers,
            message.body,
            self._body(message, connection, function),
            message.length,
            True,
            b"",
            connection.client_ip,
        )
        return self._invoker.answer(function, call, connection)

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

    def _body(self, message: RequestMessage, connection: Connection, function: Function) -> RequestBody | None:
        """The rest of the body within the function's limit. Raises ApiError 413."""
        limit_bytes = function.spec.max_body_mb * 1_048_576
        if len(message.body) > limit_bytes or (message.length or 0) > limit_bytes:
            raise ApiError(413, "body_too_large", f"{function.name} takes bodies up to {limit_bytes} bytes")
        if message.done:
            return None
        stream = connection.rest_of_body()
        stream.limit(limit_bytes, len(message.body))
        return stream

    async def _route(self, message: RequestMessage, connection: Connection) -> None:
        path, _, query = message.target.partition(b"?")
        found = self._router.match(message.method, path)
        if isinstance(found, NoMatch):
            await connection.respond(found.response(message.method, path))
            return
        request = Request(
            message.method,
            message.target,
            path,
            query,
            message.headers,
            connection.client_ip,
            connection.trusted,
            message.body,
            None if message.done else connection.rest_of_body(),
            message.length,
        )
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
