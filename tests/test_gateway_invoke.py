"""The way of one invocation through lease, exchange and retry. A real server on the simulated backend."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from gateway.connection import Connection
from gateway.function import Function
from gateway.invoke import Invoker, api_error
from gateway.limits import ServerLimits
from gateway.listeners import listen_tcp
from gateway.metrics import Metrics
from gateway.server import Server
from pool.backends.simulated import SimulatedBackend
from pool.contracts.base import Call, Reply
from pool.contracts.push import PushSession
from pool.contracts.registry import CONTRACTS
from pool.dispatcher import Dispatcher
from pool.errors import BackendUnavailable, ExchangeError, PoolError, StartError
from pool.spec import FunctionSpec, PoolSpec, make_revision
from pool.wire.http1 import RequestMessage
from scheduler.model import HostLimits


@pytest.mark.trio
async def test_a_second_try_that_has_to_wait_for_a_start_is_not_cut_by_the_first_ones_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = SimulatedBackend(1, start_s=0.5)
    spec = FunctionSpec(name="f", image="sim", timeout_s=0.1, pool=PoolSpec(min=1, max=1, freeze_after_s=None))
    revision = make_revision(spec, await backend.resolve(spec, None, lambda line: None))
    function = Function(name="f", spec=spec, revision=revision, code_digest=None, deployed_at_s=0.0, generation=1)
    real, tries = PushSession.exchange, []

    async def fail_once(session: PushSession, call: Call) -> Reply:
        tries.append(call.id)
        if len(tries) == 1:
            raise ExchangeError("nothing listens any more", sent=False)
        return await real(session, call)

    monkeypatch.setattr(PushSession, "exchange", fail_once)
    dispatcher = Dispatcher(backend, CONTRACTS, HostLimits(), epoch="1", seed=1)
    invoker = Invoker(dispatcher, Metrics(), lambda name: function)

    def answer(message: RequestMessage, connection: Connection) -> Any:
        return invoker.answer(function, Call("id", b"GET", b"/", message.headers), connection)

    server = Server([listen_tcp("127.0.0.1:0")], answer, ServerLimits())
    async with backend, trio.open_nursery() as nursery:
        await nursery.start(dispatcher.run)
        await nursery.start(server.run)
        dispatcher.deploy(revision)
        await dispatcher.wait_ready(revision.id)
        async with await trio.open_tcp_stream(*server.listeners[0].sock.getsockname()[:2]) as client:
            await client.send_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            with trio.fail_after(10):
                got = b"".join([part async for part in client])
        assert got.startswith(b"HTTP/1.1 200 "), got
        assert b"x-poold-start: cold" in got
        assert len(tries) == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [StartError("no", backend_fault=True), BackendUnavailable("no")])
def test_what_is_the_engines_fault_may_be_tried_again(error: PoolError) -> None:
    answer = api_error(error, "f")
    assert answer.status == 503
    assert answer.retry_after_s


def test_what_is_the_functions_fault_names_no_time() -> None:
    answer = api_error(StartError("no"), "f")
    assert (answer.status, answer.retry_after_s) == (502, None)
