"""Which function a request is for, and what its code gets to see of the path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.app import App
from gateway.errors import ApiError
from gateway.router import Router
from pool.contracts.base import Call
from pool.spec import FunctionSpec, WebSpec
from pool.wire.http1 import RequestMessage


class Recorder:
    """An invoker that keeps what it was asked to carry out."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Call]] = []

    def new_id(self) -> str:
        return "id"

    async def answer(self, function: Any, call: Call, connection: Any) -> None:
        self.calls.append((function.name, call))


def app_of(*names: str, **changes: Any) -> tuple[App, Recorder]:
    functions = {
        name.encode(): SimpleNamespace(name=name, spec=FunctionSpec(name=name, image="x", **changes), problem=None)
        for name in names
    }
    recorder = Recorder()
    return App(SimpleNamespace(routes=functions), recorder, Router([])), recorder  # type: ignore[arg-type]


async def ask(app: App, target: bytes, method: bytes = b"GET", **message: Any) -> None:
    request = RequestMessage()
    request.method, request.target, request.head_done, request.done = method, target, True, True
    for name, value in message.items():
        setattr(request, name, value)
    await app.answer(request, SimpleNamespace(client_ip=b"10.1.1.1", trusted=False))  # type: ignore[arg-type]


@pytest.mark.trio
@pytest.mark.parametrize(
    ("target", "base", "seen"),
    [
        (b"/fn/f", b"/fn/f", b"/"),
        (b"/fn/f/", b"/fn/f", b"/"),
        (b"/fn/f?a=/b", b"/fn/f", b"/?a=/b"),
        (b"/fn/f/a/b?c=d/e", b"/fn/f", b"/a/b?c=d/e"),
        (b"/fn/f//x%2Fy", b"/fn/f", b"//x%2Fy"),
        (b"/fn/%66/x", b"/fn/%66", b"/x"),
        (b"http://host:7070/fn/f/x?y", b"/fn/f", b"/x?y"),
        (b"HTTP://host/fn/f", b"/fn/f", b"/"),
    ],
)
async def test_a_path_below_fn_goes_to_the_function_without_its_prefix(target: bytes, base: bytes, seen: bytes) -> None:
    app, recorder = app_of("f", "g")
    await ask(app, target, b"DELETE")
    ((name, call),) = recorder.calls
    assert (name, call.method, call.base_path, call.target) == ("f", b"DELETE", base, seen)
    assert (call.event, call.client_ip) == (False, b"10.1.1.1")


@pytest.mark.trio
async def test_invoke_is_an_event_posted_where_the_spec_says() -> None:
    app, recorder = app_of("f", web=WebSpec(invoke_path="/events"))
    await ask(app, b"/v1/functions/f/invoke?x=1", b"POST", body=b"{}")
    ((_, call),) = recorder.calls
    assert (call.event, call.method, call.target, call.body) == (True, b"POST", b"/events", b"{}")
    with pytest.raises(ApiError) as caught:
        await ask(app, b"/v1/functions/f/invoke")
    assert caught.value.status == 405


@pytest.mark.trio
@pytest.mark.parametrize("target", [b"/fn/h/x", b"/fn/", b"/fn/..%2f", b"/v1/functions/h/invoke"])
async def test_an_unknown_function_is_404_and_says_which_there_are(target: bytes) -> None:
    app, _ = app_of("f", "g")
    with pytest.raises(ApiError) as caught:
        await ask(app, target, b"POST")
    assert (caught.value.status, caught.value.code) == (404, "function_not_found")
    assert "f, g" in caught.value.hint


@pytest.mark.trio
async def test_a_body_over_the_functions_own_limit_is_refused_before_anything_is_done() -> None:
    app, recorder = app_of("f", max_body_mb=1)
    with pytest.raises(ApiError) as caught:
        await ask(app, b"/fn/f/", b"PUT", length=1_048_577, done=False)
    assert caught.value.status == 413
    assert recorder.calls == []


@pytest.mark.trio
async def test_a_function_that_could_not_be_restored_says_why() -> None:
    app, _ = app_of("f")
    app._routes[b"f"].problem = "its image is gone"  # type: ignore[misc]
    with pytest.raises(ApiError) as caught:
        await ask(app, b"/fn/f/")
    assert (caught.value.status, "its image is gone" in caught.value.message) == (503, True)
