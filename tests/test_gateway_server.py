"""The HTTP server by itself: its limits, its clients' bad manners, its end. Real sockets, no daemon."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio

from gateway import sweeper
from gateway.connection import Connection
from gateway.errors import ApiError
from gateway.limits import ServerLimits
from gateway.listeners import Listener, ListenError, listen_tcp, listen_unix
from gateway.request import Response
from gateway.server import Server
from pool.wire.http1 import Limits, RequestMessage

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@pytest.fixture(autouse=True)
def quick_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "REST_TICK_S", 0.02)


class Code:
    """The answer function of a test: by path."""

    def __init__(self) -> None:
        self.cancelled = trio.Event()
        self.began = trio.Event()
        self.seen: list[bytes] = []

    async def answer(self, message: RequestMessage, connection: Connection) -> None:
        self.seen.append(message.target)
        if message.target == b"/sleep":
            connection.limit_run("sleeper", trio.current_time(), 0.2)
        if message.target in (b"/sleep", b"/wait"):
            self.began.set()
            try:
                await trio.sleep_forever()
            finally:
                self.cancelled.set()
        if message.target == b"/bad":
            raise ApiError(418, "teapot", "no", retry_after_s=0.2)
        if message.target == b"/upload":
            size = len(message.body)
            if not message.done:
                body = connection.rest_of_body()
                while data := await body.receive():
                    size += len(data)
            await connection.respond(Response(200, b"%d" % size))
        elif message.target == b"/pieces":
            await connection.respond(Response(200, pieces()))
        else:
            await connection.respond(Response(200, b"ok"))


async def pieces() -> AsyncIterator[bytes]:
    for number in range(3):
        yield b"%d;" % number


@contextlib.asynccontextmanager
async def serving(
    limits: ServerLimits | None = None, answer: Callable[[RequestMessage, Connection], Awaitable[None]] | None = None
) -> AsyncIterator[tuple[Server, Code]]:
    code = Code()
    server = Server([listen_tcp("127.0.0.1:0")], answer or code.answer, limits or ServerLimits())
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield server, code
        nursery.cancel_scope.cancel()


async def dial(server: Server) -> trio.SocketStream:
    host, port = server.listeners[0].sock.getsockname()[:2]
    return await trio.open_tcp_stream(host, port)


async def read_all(stream: trio.SocketStream) -> bytes:
    """To the end of the stream, within a bound."""
    data = b""
    with trio.fail_after(10):
        async for part in stream:
            data += part
    return data


async def read_until(stream: trio.SocketStream, end: bytes) -> bytes:
    data = b""
    with trio.fail_after(10):
        while not data.endswith(end):
            part = await stream.receive_some()
            assert part, data
            data += part
    return data


@pytest.mark.trio
async def test_requests_follow_each_other_on_a_connection_also_without_waiting() -> None:
    async with serving() as (server, code), await dial(server) as client:
        await client.send_all(GET)
        assert (await read_until(client, b"ok")).startswith(b"HTTP/1.1 200 OK\r\n")
        await client.send_all(GET.replace(b"/ ", b"/a ") + GET.replace(b"/ ", b"/b "))
        data = await read_until(client, b"ok")
        if data.count(b"200 OK") < 2:
            data += await read_until(client, b"ok")
        assert data.count(b"200 OK") == 2
        assert code.seen == [b"/", b"/a", b"/b"]


@pytest.mark.trio
async def test_an_error_is_json_with_its_status_and_when_to_try_again() -> None:
    async with serving() as (server, _), await dial(server) as client:
        await client.send_all(GET.replace(b"/ ", b"/bad "))
        data = await read_until(client, b"}}\n")
        assert data.startswith(b"HTTP/1.1 418 ")
        assert b"retry-after: 1\r\n" in data
        assert b'"code":"teapot"' in data


@pytest.mark.trio
async def test_a_head_that_trickles_is_cut_off_whatever_comes() -> None:
    async with serving(ServerLimits(head_timeout_s=0.3)) as (server, code), await dial(server) as client:

        async def trickle() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await client.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n")
                while True:
                    await client.send_all(b"X: y\r\n")
                    await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            data = b""
            with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
                while part := await client.receive_some():
                    data += part
            nursery.cancel_scope.cancel()
        assert data.startswith(b"HTTP/1.1 408 ")
        assert code.seen == []


@pytest.mark.trio
async def test_a_connection_at_rest_is_closed_after_its_time() -> None:
    async with serving(ServerLimits(idle_timeout_s=0.2)) as (server, _), await dial(server) as client:
        await client.send_all(GET)
        await read_until(client, b"ok")
        assert await read_all(client) == b""


@pytest.mark.trio
async def test_a_body_that_stops_coming_ends_the_request() -> None:
    async with serving(ServerLimits(body_timeout_s=0.2)) as (server, _), await dial(server) as client:
        await client.send_all(b"PUT /upload HTTP/1.1\r\nHost: h\r\nContent-Length: 200000\r\n\r\nsome")
        assert (await read_all(client)).startswith(b"HTTP/1.1 408 ")


@pytest.mark.trio
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /" + b"x" * 200 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 20 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"y" * 600 + b"\r\n\r\n", 431),
        (b"PUT /upload HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400),
        (b"PUT /upload HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", 421),
    ],
)
async def test_what_is_over_a_limit_or_no_request_gets_its_status(request_: bytes, status: int) -> None:
    limits = ServerLimits(
        head=Limits(header_count=10, header_bytes=500, target_bytes=100), allowed_hosts=frozenset((b"h",))
    )
    async with serving(limits) as (server, code), await dial(server) as client:
        await client.send_all(request_)
        await client.send_eof()
        assert (await read_all(client)).startswith(b"HTTP/1.1 %d " % status)
        assert code.seen == []


@pytest.mark.trio
async def test_a_body_over_the_limit_is_refused_while_it_comes() -> None:
    async with serving(ServerLimits(max_body_bytes=100_000)) as (server, _), await dial(server) as client:
        await client.send_all(b"PUT /upload HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(trio.BrokenResourceError):
            for _ in range(8):
                await client.send_all(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        data = b""
        with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(10):
            while part := await client.receive_some():
                data += part
        assert data.startswith(b"HTTP/1.1 413 ")


@pytest.mark.trio
async def test_expect_continue_is_told_to_go_on() -> None:
    async with serving() as (server, _), await dial(server) as client:
        await client.send_all(
            b"PUT /upload HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert await read_until(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send_all(b"x" * 100_000)
        assert (await read_until(client, b"100000")).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.trio
async def test_a_run_over_its_time_is_ended_and_answered_504() -> None:
    async with serving() as (server, code), await dial(server) as client:
        await client.send_all(GET.replace(b"/ ", b"/sleep "))
        data = await read_all(client)
        assert data.startswith(b"HTTP/1.1 504 ")
        assert b"sleeper did not answer within 0.2 s" in data
        assert code.cancelled.is_set()


@pytest.mark.trio
async def test_a_client_that_goes_away_ends_what_runs_for_it() -> None:
    async with serving() as (server, code):
        client = await dial(server)
        await client.send_all(GET.replace(b"/ ", b"/wait "))
        with trio.fail_after(10):
            await code.began.wait()
            await client.aclose()
            await code.cancelled.wait()


@pytest.mark.trio
async def test_an_answer_in_pieces_is_chunked_and_for_http_1_0_ends_with_the_connection() -> None:
    async with serving() as (server, _):
        async with await dial(server) as client:
            await client.send_all(GET.replace(b"/ ", b"/pieces "))
            data = await read_until(client, b"0\r\n\r\n")
            assert b"transfer-encoding: chunked" in data
            assert data.endswith(b"\r\n\r\n2\r\n0;\r\n2\r\n1;\r\n2\r\n2;\r\n0\r\n\r\n")
        async with await dial(server) as client:
            await client.send_all(b"GET /pieces HTTP/1.0\r\n\r\n")
            data = await read_all(client)
            assert data.endswith(b"\r\n\r\n0;1;2;")
            assert b"chunked" not in data


@pytest.mark.trio
async def test_one_connection_too_many_is_told_so_and_the_others_go_on() -> None:
    async with serving(ServerLimits(max_connections=1)) as (server, _), await dial(server) as first:
        await first.send_all(GET)
        await read_until(first, b"ok")
        async with await dial(server) as second:
            await second.send_all(GET)
            data = await read_all(second)
            assert data.startswith(b"HTTP/1.1 503 ")
            assert b"too_many_connections" in data
        await first.send_all(GET)
        await read_until(first, b"ok")


@pytest.mark.trio
async def test_closing_lets_the_present_request_end_and_drops_those_at_rest() -> None:
    go_on = trio.Event()

    async def answer(message: RequestMessage, connection: Connection) -> None:
        if message.target == b"/slow":
            await go_on.wait()
        await connection.respond(Response(200, b"ok"))

    async with serving(answer=answer) as (server, _), await dial(server) as slow, await dial(server) as resting:
        await resting.send_all(GET)
        await read_until(resting, b"ok")
        await slow.send_all(GET.replace(b"/ ", b"/slow "))
        while server.connections < 2:
            await trio.sleep(0.001)
        await trio.sleep(0.05)  # so that the request has been read: nothing tells from outside
        server.close()
        assert await read_all(resting) == b""
        assert not server.closed.is_set()
        go_on.set()
        data = await read_all(slow)
        assert data.endswith(b"ok")
        with trio.fail_after(5):
            await server.closed.wait()


@pytest.mark.trio
async def test_a_new_connection_has_its_first_request_answered_though_the_server_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.connection.CLOSING_S", 0.3)
    async with serving() as (server, _), await dial(server) as late, await dial(server) as silent:
        while server.connections < 2:
            await trio.sleep(0.001)
        server.close()
        await late.send_all(GET)
        data = await read_all(late)
        assert data.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connection: close\r\n" in data
        assert await read_all(silent) == b""
        with trio.fail_after(5):
            await server.closed.wait()


def test_addresses_that_cannot_be_listened_on_are_explained(tmp_path: Path) -> None:
    taken = listen_tcp("127.0.0.1:0")
    port = taken.sock.getsockname()[1]
    with pytest.raises(ListenError, match="something listens there already"):
        listen_tcp(f"127.0.0.1:{port}")
    taken.close()
    path = tmp_path / "s.sock"
    first = listen_unix(path, 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ListenError, match="another poold answers"):
        listen_unix(path, 0o600)
    first.sock.close()  # as a daemon that was killed: its socket file stays
    second = listen_unix(path, 0o600)
    second.close()
    assert not path.exists()
    with pytest.raises(ListenError):
        listen_unix(Path("/proc/nowhere/s.sock"), 0o600)


def test_a_listener_says_its_address() -> None:
    four = listen_tcp("127.0.0.1:0")
    assert four.address() == f"http://127.0.0.1:{four.sock.getsockname()[1]}"
    four.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind("")  # Linux gives it an abstract name
        assert Listener(sock, trusted=True).address().startswith("unix://")


@pytest.mark.trio
async def test_a_flood_of_connections_is_bounded_and_does_not_keep_out_who_administers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gateway.server.TOLD_AT_ONCE", 2)
    monkeypatch.setattr("gateway.server.KEPT_FOR_TRUSTED", 3)
    listeners = [listen_tcp("127.0.0.1:0"), listen_unix(tmp_path / "s", 0o600)]
    server = Server(listeners, Code().answer, ServerLimits(max_connections=1))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        async with contextlib.AsyncExitStack() as flood:
            for _ in range(3):
                await flood.enter_async_context(await dial(server))
            with trio.fail_after(10):
                while server.connections < 3:
                    await trio.sleep(0.01)
            for _ in range(3):
                late = await flood.enter_async_context(await dial(server))
                assert await read_all(late) == b""
            admin = await flood.enter_async_context(await trio.open_unix_socket(tmp_path / "s"))
            await admin.send_all(GET)
            assert (await read_until(admin, b"ok")).startswith(b"HTTP/1.1 200 ")
            assert server.connections == 4
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_client_that_takes_its_answer_slowly_gets_all_of_it_after_the_runs_time() -> None:
    size = 8 * 1024 * 1024

    async def answer(message: RequestMessage, connection: Connection) -> None:
        connection.limit_run("quick", trio.current_time(), 0.1)
        await connection.reply(200, b"", bytes(size))

    async with serving(answer=answer) as (server, _), await dial(server) as client:
        await client.send_all(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        (connection,) = await _running(server)
        with trio.fail_after(10):
            while connection.requests_seen < 1:  # the sweeper has looked
                await trio.sleep(0.01)
        await trio.sleep(0.2)  # the run's time passes; it is the thing tested
        assert len(await read_all(client)) > size


async def _running(server: Server) -> list[Connection]:
    with trio.fail_after(10):
        while not server._sweeper.running:
            await trio.sleep(0.01)
    return list(server._sweeper.running)


@pytest.mark.trio
@pytest.mark.parametrize(
    "head", [b"POST /bad HTTP/1.1\r\nHost: h\r\nContent-Length: 16000000\r\n\r\n", b"POST bad\r\n\r\n"]
)
async def test_a_client_that_goes_on_sending_after_a_refusal_sees_it(head: bytes) -> None:
    async with serving() as (server, _), await dial(server) as client:
        await client.send_all(head)
        for _ in range(16):
            await client.send_all(bytes(1_000_000))
        assert (await read_all(client)).startswith(b"HTTP/1.1 4")


@pytest.mark.trio
async def test_a_client_that_sends_for_ever_after_a_refusal_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.connection.LINGER_S", 0.1)
    async with serving() as (server, _), await dial(server) as client:
        await client.send_all(b"POST /bad HTTP/1.1\r\nHost: h\r\nContent-Length: 16000000\r\n\r\n")
        with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
            while True:
                await client.send_all(b"x")
                await trio.sleep(0.01)
        assert server.connections == 0
