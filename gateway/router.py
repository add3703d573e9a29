"""The one table of routes: the server dispatches by it, and the OpenAPI document is made from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from gateway.errors import ApiError
from gateway.request import Request, Response

JSON = "application/json"
NDJSON = "application/x-ndjson"

RouteFunction = Callable[[Request, dict[str, str]], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class QueryParameter:
    """One name in a route's query, for the document; the route itself reads and checks it."""

    name: str
    kind: str  # JSON Schema: string, integer, number, boolean
    description: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer a route may give. `shape` is a type msgspec can describe; None: bytes of that media type.

    `lines`: the shapes that a line may have where the client asked for ndjson.
    """

    description: str
    shape: object = None
    media: tuple[str, ...] = (JSON,)
    lines: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.

    `pattern` is a path with {parameters}, each one segment. `function` is None where the server answers before it
    asks the router (invocations, for speed): such a route is only documented. `admin`: only on a socket that may
    administer the daemon.
    """

    method: str
    pattern: str
    function: RouteFunction | None
    summary: str
    operation: str  # the document's operationId
    admin: bool = True
    tag: str = "functions"
    description: str = ""
    query: tuple[QueryParameter, ...] = ()
    request: object = None  # a shape as in Answer, or None
    request_media: tuple[str, ...] = ()
    request_required: bool = True
    answers: dict[int, Answer] = field(default_factory=dict)
    errors: tuple[int, ...] = ()  # statuses whose body is the error shape

    def parameters(self) -> list[str]:
        """The names in the pattern, in order."""
        return [part[1:-1] for part in self.pattern.split("/") if part.startswith("{")]


@dataclass(frozen=True, slots=True)
class Match:
    """A route and its path parameters, percent-decoded."""

    route: Route
    params: dict[str, str]


@dataclass(frozen=True, slots=True)
class NoMatch:
    """No such path (404, `allow` empty), or the path exists and takes other methods (405)."""

    status: int
    allow: tuple[str, ...] = ()

    def response(self, method: bytes, path: bytes) -> Response:
        """The answer to send."""
        shown = path.decode("ascii", "replace")
        if self.status == 404:
            hint = "see GET /v1/openapi.json for the routes; functions answer below /fn/NAME/"
            error = ApiError(404, "no_such_route", f"there is nothing at {shown}", hint=hint)
            return Response(404, error.body())
        allow = ", ".join(self.allow)
        message = f"{shown} does not take {method.decode('ascii', 'replace')}"
        error = ApiError(405, "method_not_allowed", message, hint=f"it takes {allow}")
        return Response(405, error.body(), headers=[(b"Allow", allow.encode())])


class Router:
    """Finds the route for a method and a path. A literal segment wins over a parameter."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Raises ValueError for two routes of the same method and shape."""
        self.routes = tuple(routes)
        self._exact: dict[str, dict[str, Route]] = {}
        self._by_length: dict[int, list[tuple[tuple[str, ...], dict[str, Route]]]] = {}
        for route in routes:
            if route.function is not None:
                self._add(route)
        for shapes in self._by_length.values():
            shapes.sort(key=lambda shape: [part == "" for part in shape[0]])

    def _add(self, route: Route) -> None:
        parts = tuple("" if part.startswith("{") else part for part in route.pattern[1:].split("/"))
        if "" not in parts:
            methods = self._exact.setdefault(route.pattern, {})
        else:
            shapes = self._by_length.setdefault(len(parts), [])
            methods = next((methods for shape, methods in shapes if shape == parts), {})
            if not methods:
                shapes.append((parts, methods))
        if route.method in methods:
            raise ValueError(f"two routes for {route.method} {route.pattern}")
        methods[route.method] = route

    def match(self, method: bytes, path: bytes) -> Match | NoMatch:
        """The route for a request line's method and path (still percent-encoded, without its query).

        HEAD is answered by a GET route; the server sends no body then.
        """
        verb = method.decode("ascii", "replace")
        text = path.decode("ascii", "replace")
        exact = self._exact.get(text)
        if exact is not None:
            return _choose(exact, verb, {})
        parts = text[1:].split("/")
        for shape, methods in self._by_length.get(len(parts), ()):
            if all(part if want == "" else part == want for want, part in zip(shape, parts, strict=True)):
                values = [unquote(part) for want, part in zip(shape, parts, strict=True) if want == ""]
                found = _choose(methods, verb, {})
                if isinstance(found, NoMatch):
                    return found
                return Match(found.route, dict(zip(found.route.parameters(), values, strict=True)))
        return NoMatch(404)


def _choose(methods: dict[str, Route], verb: str, params: dict[str, str]) -> Match | NoMatch:
    route = methods.get(verb)
    if route is None and verb == "HEAD":
        route = methods.get("GET")
    if route is not None:
        return Match(route, params)
    allow = set(methods) | ({"HEAD"} if "GET" in methods else set())
    return NoMatch(405, tuple(sorted(allow)))
