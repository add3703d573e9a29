"""The web contract: what a caller sends reaches the code as it is, and what the code answers comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import h11
import pytest
import trio
import trio.testing
from fake_instance import FakeInstance, Peer, Pieces, Serve, link_to, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

from pool.contracts.base import Call, Headers
from pool.contracts.push import LeasedBody
from pool.contracts.web import WebContract, WebSession
from pool.errors import BackendUnavailable, BadAnswer, ExchangeError, StartError
from pool.spec import FunctionSpec, WebSpec

WEB = WebContract()
SPEC = FunctionSpec(name="f", code=".")

Answer = Callable[[Peer, h11.Request, bytes], Awaitable[None]]


async def echo(peer: Peer, request: h11.Request, body: bytes) -> None:
    await peer.answer(200, [("x-method", request.method.decode()), ("x-target", request.target.decode())], body)


def serving(answer: Answer = echo, asked: list[tuple[h11.Request, bytes]] | None = None) -> Serve:
    async def serve(stream: trio.SocketStream) -> None:
        peer = Peer(stream)
        while (request := await peer.request()) is not None:
            if asked is not None:
                asked.append(request)
            await answer(peer, *request)

    return serve


def saying(*answers: bytes) -> Serve:
    """Code that says this, one after the other, whatever it is asked, and then closes."""

    async def serve(stream: trio.SocketStream) -> None:
        for answer in answers:
            if not await stream.receive_some():
                return
            await stream.send_all(answer)

    return serve


@asynccontextmanager
async def session_with(
    serve: Serve, spec: FunctionSpec = SPEC, *, prepared: bool = True
) -> AsyncIterator[tuple[WebSession, FakeInstance]]:
    async with trio.open_nursery() as nursery:
        running = FakeInstance(nursery, serve)
        session = WEB.session(link_to(running, spec, 8080))
        try:
            if prepared:
                await session.prepare()
            yield session, running
        finally:
            session.close()
            nursery.cancel_scope.cancel()


def call(method: bytes = b"GET", target: bytes = b"/", headers: Headers | None = None, body: bytes = b"") -> Call:
    return Call("c-1", method, target, [(b"Host", b"x")] if headers is None else headers, body)


# --- what reaches the code ----------------------------------------------------------------------------------


@pytest.mark.trio
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"PROPFIND"])
async def test_every_method_passes(method: bytes) -> None:
    asked: list[tuple[h11.Request, bytes]] = []
    async with session_with(serving(asked=asked)) as (session, running):
        for _ in range(2):
            reply = await session.exchange(call(method, b"/a/b?c=d", body=b"body" if method != b"HEAD" else b""))
            assert reply.status == 200
            assert (b"x-method", method) in reply.headers
            assert reply.body == (b"body" if method != b"HEAD" else b"")
        assert [body for _, body in asked] == [b"body" if method != b"HEAD" else b""] * 2
        assert running.dials == 1, "the connection was not kept"
        assert running.port == 8080


@pytest.mark.trio
@pytest.mark.parametrize("target", [b"/a%2Fb%20c", b"/a//b/../c", b"/?q=%zz&q=+", b"/%E4%B8%AD", b"*", b"/a;b=c?x?y"])
async def test_path_and_query_are_not_touched(target: bytes) -> None:
    async with session_with(serving()) as (session, _):
        reply = await session.exchange(call(target=target))
        assert (b"x-target", target) in reply.headers


def rendered(headers: Headers, **more: object) -> list[bytes]:
    """The header lines that the code gets."""
    session = WebSession.__new__(WebSession)  # rendering needs no instance
    made = session.render(Call("c-1", b"GET", b"/", headers, **more))  # type: ignore[arg-type] # fields of Call
    head, end, rest = made.partition(b"\r\n\r\n")
    assert (end, rest) == (b"\r\n\r\n", b"")
    return head.split(b"\r\n")[1:]


def test_headers_keep_their_order_case_and_duplicates() -> None:
    headers = [(b"Host", b"h"), (b"X-B", b"2"), (b"x-a", b"1"), (b"X-B", b"1"), (b"Cookie", b"a=1; b"), (b"Via", b"")]
    assert rendered(headers) == [
        b"Host: h",
        b"X-B: 2",
        b"x-a: 1",
        b"X-B: 1",
        b"Cookie: a=1; b",
        b"Via: ",
        b"x-poold-invocation: c-1",
    ]


def test_what_concerns_the_callers_connection_stays_behind() -> None:
    headers = [
        (b"Connection", b"close, X-Mine"),
        (b"X-Mine", b"1"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Proxy-Connection", b"keep-alive"),
        (b"TE", b"trailers"),
        (b"Trailer", b"x"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Upgrade", b"h2c"),
        (b"Content-Length", b"99"),
        (b"Expect", b"100-continue"),
        (b"X-Poold-Invocation", b"forged"),
        (b"host", b"h"),
    ]
    assert rendered(headers) == [b"host: h", b"x-poold-invocation: c-1"]


def test_a_request_without_host_gets_one() -> None:
    assert rendered([(b"a", b"b")]) == [b"a: b", b"host: localhost", b"x-poold-invocation: c-1"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"body": b"abc"}, b"content-length: 3"),
        ({"stream": Pieces(), "length": 7}, b"content-length: 7"),
        ({"stream": Pieces()}, b"transfer-encoding: chunked"),
    ],
)
def test_the_body_is_announced_once(more: dict[str, object], line: bytes) -> None:
    lines = rendered([(b"host", b"h"), (b"content-length", b"1"), (b"transfer-encoding", b"chunked")], **more)
    assert lines == [b"host: h", line, b"x-poold-invocation: c-1"]


visible = st.binary(min_size=1, max_size=20).map(lambda raw: bytes(c for c in raw if c > 0x20 and c != 0x7F) or b"v")


@given(st.lists(st.tuples(st.from_regex(rb"\Ax-[a-z0-9!#$%&'*+.^_`|~-]{1,8}\Z"), visible), max_size=8), visible)
@settings(deadline=None)
def test_header_values_pass_as_bytes(pairs: Headers, first: bytes) -> None:
    """Any bytes that may stand in a header arrive as they are, both ways."""

    async def check() -> None:
        asked: list[tuple[h11.Request, bytes]] = []
        answer = b"HTTP/1.1 200 OK\r\nx-first: %b\r\ncontent-length: 0\r\n\r\n" % first
        async with session_with(saying(answer)) as (session, _):
            reply = await session.exchange(call(headers=[(b"host", b"x"), *pairs]))
            assert (b"x-first", first) in reply.headers
        async with session_with(serving(asked=asked)) as (session, _):
            await session.exchange(call(headers=[(b"host", b"x"), *pairs]))
            assert [pair for pair in asked[0][0].headers.raw_items() if pair[0].startswith(b"x-")] == [
                *pairs,
                (b"x-poold-invocation", b"c-1"),
            ]

    trio.run(check)


@pytest.mark.trio
@pytest.mark.parametrize("length", [None, 3_000_000])
async def test_a_large_body_streams_both_ways(length: int | None) -> None:
    """The code sends back what it gets while it gets it: more than all buffers between hold."""

    async def serve(stream: trio.SocketStream) -> None:
        peer = Peer(stream)
        await peer.event()
        await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while isinstance(event := await peer.event(), h11.Data):
            await stream.send_all(b"%x\r\n%b\r\n" % (len(event.data), event.data))
        await stream.send_all(b"0\r\n\r\n")

    async with session_with(serve) as (session, _):
        asked = call(b"PUT", body=b"x" * 1_000_000)
        asked.stream = Pieces(*[b"y" * 50_000] * 40)
        asked.length = length
        reply = await session.exchange(asked)
        assert reply.stream is not None
        body = reply.body + await read_all(reply.stream)
        assert body == b"x" * 1_000_000 + b"y" * 2_000_000


# --- what comes back ----------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_answer_is_as_it_was_given() -> None:
    answer = b"HTTP/1.1 599 Odd\r\nSet-Cookie: a\r\nset-cookie: b\r\nX: \xff\xc3\xa4\r\nContent-Length: 2\r\n\r\n\0\xff"
    async with session_with(saying(answer)) as (session, _):
        reply = await session.exchange(call())
        assert (reply.status, reply.body, reply.function_error) == (599, b"\0\xff", None)
        assert reply.headers == [
            (b"Set-Cookie", b"a"),
            (b"set-cookie", b"b"),
            (b"X", b"\xff\xc3\xa4"),
            (b"Content-Length", b"2"),
        ]


@pytest.mark.trio
@pytest.mark.parametrize(("status", "failed"), [(200, False), (404, False), (500, True), (503, True)])
async def test_an_event_fails_by_the_status(status: int, failed: bool) -> None:
    async def answer(peer: Peer, request: h11.Request, body: bytes) -> None:
        await peer.answer(status)

    async with session_with(serving(answer)) as (session, _):
        asked = call(b"POST")
        asked.event = True
        reply = await session.exchange(asked)
        assert (reply.function_error is not None) == failed


@pytest.mark.trio
async def test_a_streamed_answer_gives_its_connection_back_at_its_end() -> None:
    async def answer(peer: Peer, request: h11.Request, body: bytes) -> None:
        await peer.answer(body=b"x" * 2_000_000)

    async with session_with(serving(answer)) as (session, running):
        for _ in range(3):
            reply = await session.exchange(call())
            assert isinstance(reply.stream, LeasedBody)
            assert len(reply.body + await read_all(reply.stream)) == 2_000_000
        assert running.dials == 1


@pytest.mark.trio
async def test_a_streamed_answer_that_breaks_off_is_an_error_and_loses_its_connection() -> None:
    begun = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
    async with session_with(saying(begun)) as (session, _):
        reply = await session.exchange(call())
        assert reply.body == b"abc"
        assert reply.stream is not None
        with pytest.raises(ExchangeError) as raised:
            await reply.stream.receive()
        assert raised.value.sent
        assert not session._busy
        assert not session._idle


@pytest.mark.trio
async def test_garbage_is_a_bad_answer() -> None:
    async with session_with(saying(b"220 mail ready\r\n")) as (session, _):
        with pytest.raises(BadAnswer):
            await session.exchange(call())
        assert not session._busy


# --- connections --------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_each_of_several_at_a_time_has_a_connection() -> None:
    waiting = trio.Event()

    async def answer(peer: Peer, request: h11.Request, body: bytes) -> None:
        await waiting.wait()
        await peer.answer(body=body)

    spec = FunctionSpec(name="f", code=".", concurrency=3)
    async with session_with(serving(answer), spec) as (session, running):
        got: list[bytes] = []

        async def ask(number: int) -> None:
            got.append((await session.exchange(call(b"POST", body=b"%d" % number))).body)

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(ask, number)
                await trio.testing.wait_all_tasks_blocked()
                waiting.set()
        assert sorted(got) == [b"0", b"0", b"1", b"1", b"2", b"2"]
        assert running.dials == 3


@pytest.mark.trio
@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_a_connection_that_was_closed_at_rest_is_replaced(
    method: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        peer = Peer(stream)
        asked = await peer.request()
        if asked is not None:
            await echo(peer, *asked)  # and close

    async with session_with(serve) as (session, running):
        for _ in range(2):
            assert (await session.exchange(call(method))).status == 200
            await trio.sleep(10)
        assert running.dials == 2


@pytest.mark.trio
@pytest.mark.parametrize(("method", "again"), [(b"GET", True), (b"HEAD", True), (b"POST", False), (b"PUT", False)])
async def test_a_connection_that_closes_under_the_request(method: bytes, again: bool) -> None:
    """The code closes what rested just when the next request comes: only what is safe is sent twice."""
    connections = 0

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await stream.receive_some()
            return  # close without an answer
        await serving()(stream)

    async with session_with(serve) as (session, running):
        if again:
            assert (await session.exchange(call(method))).status == 200
        else:
            with pytest.raises(ExchangeError) as raised:
                await session.exchange(call(method))
            assert raised.value.sent
        assert running.dials == 1 + again


@pytest.mark.trio
async def test_code_that_died_is_not_asked_again() -> None:
    async with trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            running.exited = "exit code 4"

        running = FakeInstance(nursery, serve)
        session = WEB.session(link_to(running, SPEC))
        await session.prepare()
        with pytest.raises(ExchangeError) as raised:
            await session.exchange(call())
        assert raised.value.sent, "it may have been carried out"
        with pytest.raises(ExchangeError) as raised:
            await session.exchange(call())
        assert not raised.value.sent
        session.close()


@pytest.mark.trio
async def test_frozen_code_is_given_a_fresh_connection() -> None:
    async with session_with(serving()) as (session, running):
        await session.exchange(call())
        old = session._idle[0]
        await session.after_freeze()
        assert old is not session._idle[0]
        assert not old.reusable
        await session.exchange(call())
        assert running.dials == 2


@pytest.mark.trio
async def test_frozen_code_that_cannot_be_reached_is_left_for_later() -> None:
    class Unreachable(FakeInstance):
        reachable = True

        async def dial(self, port: int):  # type: ignore[no-untyped-def] # as in FakeInstance
            if not self.reachable:
                raise BackendUnavailable("no way in")
            return await super().dial(port)

    async with trio.open_nursery() as nursery:
        running = Unreachable(nursery, serving())
        session = WEB.session(link_to(running, SPEC))
        await session.prepare()
        running.reachable = False
        await session.after_freeze()
        assert not session._idle
        running.reachable = True
        assert (await session.exchange(call())).status == 200
        session.close()
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_closing_ends_what_is_in_use_too() -> None:
    async def answer(peer: Peer, request: h11.Request, body: bytes) -> None:
        await trio.sleep_forever()

    async with session_with(serving(answer)) as (session, _), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ExchangeError):
                await session.exchange(call())

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        session.close()


@pytest.mark.trio
async def test_a_cancelled_exchange_closes_its_connection() -> None:
    async def answer(peer: Peer, request: h11.Request, body: bytes) -> None:
        await trio.sleep_forever()

    async with session_with(serving(answer)) as (session, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await session.exchange(call())
        assert scope.cancelled_caught
        assert not session._busy
        assert not session._idle


# --- the start ----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_it_is_ready_when_it_listens(autojump_clock: trio.testing.MockClock) -> None:
    async with session_with(serving(), prepared=False) as (session, running):
        running.refused = 20
        await session.prepare()
        assert running.dials == 21
        assert session.link.stages["connect"] > 0
        assert session.link.stages["init"] == 0


@pytest.mark.trio
async def test_code_that_ends_before_it_listens_is_a_failed_start(autojump_clock: trio.testing.MockClock) -> None:
    async with session_with(serving(), prepared=False) as (session, running), trio.open_nursery() as nursery:
        running.refused = 1_000_000

        async def end() -> None:
            await trio.sleep(3)
            running.exited = "exit code 3"

        nursery.start_soon(end)
        with pytest.raises(StartError, match="exit code 3"):
            await session.prepare()


@pytest.mark.trio
async def test_a_ready_path_is_asked_until_it_answers_below_500(autojump_clock: trio.testing.MockClock) -> None:
    asked: list[tuple[h11.Request, bytes]] = []

    async def answer(peer: Peer, request: h11.Request, body: bytes) -> None:
        await peer.answer(503 if len(asked) < 4 else 404, body=b"x" * 100)

    spec = FunctionSpec(name="f", code=".", web=WebSpec(ready_path="/ready?a"))
    async with session_with(serving(answer, asked), spec) as (_, running):
        assert [bytes(request.target) for request, _ in asked] == [b"/ready?a"] * 4
        assert running.dials == 1


def test_a_start_that_failed_names_what_was_asked_of_the_code() -> None:
    spec = FunctionSpec(name="f", code=".", web=WebSpec(ready_path="/ready"))
    hint = WebContract().start_error(spec, "not ready within 3 s", "").hint
    assert "listen on 0.0.0.0:8080" in hint
    assert "answer GET /ready (web.ready_path) below 500" in hint
    assert "ready_path" not in WebContract().start_error(FunctionSpec(name="f", code="."), "why", "").hint


@pytest.mark.trio
async def test_a_ready_path_that_does_not_speak_http_is_a_failed_start() -> None:
    spec = FunctionSpec(name="f", code=".", web=WebSpec(ready_path="/"))
    async with session_with(saying(b"220 mail ready\r\n"), spec, prepared=False) as (session, _):
        with pytest.raises(StartError, match="does not answer HTTP"):
            await session.prepare()


def test_port_is_taken_and_nothing_else() -> None:
    assert WEB.check(SPEC) == []
    assert [place for place, _ in WEB.check(FunctionSpec(name="f", code=".", env={"PORT": "1", "A": ""}))] == [
        "env.PORT"
    ]
    assert WEB.environment(SPEC, "i-1", 8081)["PORT"] == "8081"
    WEB.check_call(SPEC, call())


def test_the_error_of_a_start_says_what_to_do() -> None:
    error = WEB.start_error(FunctionSpec(name="f", code=".", port=8085), "not ready within 1 s", "its words")
    assert "f did not become ready: not ready within 1 s" in error.message
    assert "0.0.0.0:8085" in error.hint
    assert error.log_tail == "its words"


@pytest.mark.parametrize("path", ["/a b", "/a\r\nx-evil: 1", "/a\n", "/ä", "/a#b"])
@pytest.mark.parametrize("key", ["invoke_path", "ready_path"])
def test_a_path_that_would_break_a_requests_first_line_is_refused(key: str, path: str) -> None:
    spec = FunctionSpec(name="f", image="i", web=WebSpec(**{key: path}))
    assert [place for place, _ in WebContract().check(spec)] == [f"web.{key}"]


def test_paths_with_queries_and_escapes_are_fine() -> None:
    spec = FunctionSpec(name="f", image="i", web=WebSpec(invoke_path="/a%20b/c?d=1&e='2'", ready_path="/"))
    assert WebContract().check(spec) == []
