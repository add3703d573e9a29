"""The router: what it finds, and what it says when there is nothing."""

from __future__ import annotations

import json

import pytest

from gateway.request import Request, Response
from gateway.router import Match, NoMatch, Route, Router


async def _nothing(request: Request, params: dict[str, str]) -> Response:
    return Response(200)


def _route(method: str, pattern: str) -> Route:
    return Route(method, pattern, _nothing, "", f"{method}{pattern}")


def test_the_router_finds_routes_and_decodes_parameters() -> None:
    router = Router([_route("GET", "/a/{name}"), _route("GET", "/a/fixed"), _route("PUT", "/a/{name}/b/{other}")])
    found = router.match(b"PUT", b"/a/x%20y%2Fz/b/%C3%A4")
    assert isinstance(found, Match)
    assert found.params == {"name": "x y/z", "other": "ä"}
    fixed = router.match(b"GET", b"/a/fixed")
    assert isinstance(fixed, Match)
    assert fixed.route.pattern == "/a/fixed"
    head = router.match(b"HEAD", b"/a/n")
    assert isinstance(head, Match)
    assert head.route.method == "GET"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        (b"GET", b"/", 404),
        (b"GET", b"/a", 404),
        (b"GET", b"/a/", 404),
        (b"GET", b"/a/n/", 404),
        (b"GET", b"*", 404),
        (b"POST", b"/a/n", 405),
        (b"\xff", b"/a/n", 405),
        (b"GET", b"\xff", 404),
    ],
)
def test_what_there_is_not_is_404_and_what_is_not_taken_405(method: bytes, path: bytes, status: int) -> None:
    found = Router([_route("GET", "/a/{name}"), _route("DELETE", "/a/{name}")]).match(method, path)
    assert isinstance(found, NoMatch)
    response = found.response(method, path)
    assert response.status == status
    assert dict(response.headers) == ({b"Allow": b"DELETE, GET, HEAD"} if status == 405 else {})
    assert isinstance(response.body, bytes)
    assert json.loads(response.body)["error"]["message"]


def test_a_route_stands_in_the_table_once() -> None:
    with pytest.raises(ValueError, match="two routes"):
        Router([_route("GET", "/a/{name}"), _route("GET", "/a/{other}")])
