"""The bare proxy is a correct HTTP/1.1 proxy: the comparison would mean nothing if it cut corners."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from bench.proxy import Proxy, listen

Answer = Callable[[trio.SocketStream, bytes], Awaitable[bool]]  # (connection, request read so far) -> keep going


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = await stream.receive_some()
        if not part:
            break
        data += part
    return data


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([part async for part in stream])


@asynccontextmanager
async def proxied(answer: Answer) -> AsyncIterator[tuple[trio.SocketStream, list[bytes]]]:
    """A client's connection to a proxy in front of `answer`; and the heads that the upstream saw."""
    seen: list[bytes] = []

    async def upstream(stream: trio.SocketStream) -> None:
        async with stream:
            while True:
                head = await read_until(stream, b"\r\n\r\n")
                if not head:
                    return
                seen.append(head)
                if not await answer(stream, head):
                    return

    async with trio.open_nursery() as nursery:
        origin = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        nursery.start_soon(trio.serve_listeners, upstream, [origin])
        listener = listen("127.0.0.1", 0)
        nursery.start_soon(Proxy(origin.socket.getsockname()[:2]).serve, listener)
        with trio.fail_after(10), listener:
            async with await trio.open_tcp_stream(*listener.getsockname()) as client:
                yield client, seen
            nursery.cancel_scope.cancel()


def replying(data: bytes, *, keep: bool = True) -> Answer:
    async def answer(stream: trio.SocketStream, head: bytes) -> bool:
        await stream.send_all(data)
        return keep

    return answer


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.trio
async def test_requests_follow_each_other_on_one_connection() -> None:
    async with proxied(replying(PLAIN)) as (client, seen):
        for path in (b"/a", b"/b?c=d"):
            await client.send_all(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path)
            assert await read_until(client, b"ok") == PLAIN
        assert [head.split(b" ")[1] for head in seen] == [b"/a", b"/b?c=d"]


@pytest.mark.trio
async def test_pipelined_requests_are_answered_in_order() -> None:
    async def answer(stream: trio.SocketStream, head: bytes) -> bool:
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + head.split(b" ")[1])
        return True

    async with proxied(answer) as (client, _):
        await client.send_all(b"GET /1 HTTP/1.1\r\nHost: x\r\n\r\nGET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
        data = await read_until(client, b"/2")
        assert data.count(b"200 OK") == 2
        assert data.index(b"/1") < data.index(b"/2")


@pytest.mark.trio
async def test_hop_by_hop_fields_go_no_further() -> None:
    reply = b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nX-Kept: yes\r\nContent-Length: 2\r\n\r\nok"
    async with proxied(replying(reply)) as (client, seen):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTE: trailers\r\nX-A: 1\r\n\r\n")
        data = await read_all(client)
        assert b"Keep-Alive" not in data
        assert b"X-Kept: yes" in data
        assert b"connection: close" in data
        assert seen[0] == b"GET / HTTP/1.1\r\nHost: x\r\nX-A: 1\r\n\r\n"


@pytest.mark.trio
async def test_chunked_both_ways() -> None:
    bodies: list[bytes] = []

    async def answer(stream: trio.SocketStream, head: bytes) -> bool:
        rest = head if head.endswith(b"0\r\n\r\n") else head + await read_until(stream, b"0\r\n\r\n")
        bodies.append(rest.partition(b"\r\n\r\n")[2])
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await stream.send_all(b"2\r\nde\r\n0\r\n\r\n")
        return True

    async with proxied(answer) as (client, seen):
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n")
        await client.send_all(b"5\r\npedia\r\n0\r\n\r\n")
        data = await read_until(client, b"0\r\n\r\n")
        assert data.lower().count(b"transfer-encoding: chunked") == 1
        assert data.endswith(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        assert b"transfer-encoding: chunked" in seen[0].lower()
        assert bodies[0].endswith(b"4\r\nwiki\r\n5\r\npedia\r\n0\r\n\r\n")


@pytest.mark.trio
async def test_head_has_no_body_and_the_connection_goes_on() -> None:
    async def answer(stream: trio.SocketStream, head: bytes) -> bool:
        body = b"" if head.startswith(b"HEAD") else b"ok"
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + body)
        return True

    async with proxied(answer) as (client, _):
        await client.send_all(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_until(client, b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_until(client, b"ok") == PLAIN


@pytest.mark.trio
@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_that_cannot_have_a_body(status: bytes) -> None:
    async with proxied(replying(b"HTTP/1.1 %b\r\n\r\n" % status)) as (client, seen):
        for _ in range(2):
            await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await read_until(client, b"\r\n\r\n") == b"HTTP/1.1 %b\r\n\r\n" % status
        assert len(seen) == 2


@pytest.mark.trio
async def test_large_bodies_both_ways() -> None:
    size = 3_000_000

    async def answer(stream: trio.SocketStream, head: bytes) -> bool:
        body = head.partition(b"\r\n\r\n")[2]
        while len(body) < size:
            body += await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return True

    sent = bytes(range(256)) * (size // 256)
    sent += b"x" * (size - len(sent))
    async with proxied(answer) as (client, _):
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + sent)
        data = b""
        while len(data.partition(b"\r\n\r\n")[2]) < size:
            part = await client.receive_some()
            assert part
            data += part
        assert data.partition(b"\r\n\r\n")[2] == sent


@pytest.mark.trio
async def test_an_answer_that_ends_with_its_connection() -> None:
    async with proxied(replying(b"HTTP/1.1 200 OK\r\n\r\nto the end", keep=False)) as (client, _):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        data = await read_until(client, b"0\r\n\r\n")
        assert b"transfer-encoding: chunked" in data
        assert b"a\r\nto the end\r\n" in data


@pytest.mark.trio
async def test_expectation_is_answered_here() -> None:
    async def answer(stream: trio.SocketStream, head: bytes) -> bool:
        if not head.endswith(b"body"):
            await read_until(stream, b"body")
        await stream.send_all(PLAIN)
        return True

    async with proxied(answer) as (client, seen):
        await client.send_all(b"PUT / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
        assert await read_until(client, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send_all(b"body")
        assert await read_until(client, b"ok") == PLAIN
        assert b"expect" not in seen[0].lower()


@pytest.mark.trio
async def test_an_old_client_gets_what_it_understands() -> None:
    reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    async with proxied(replying(reply)) as (client, _):
        await client.send_all(b"GET / HTTP/1.0\r\n\r\n")
        data = await read_all(client)
        assert b"chunked" not in data
        assert data.endswith(b"\r\n\r\nok")


@pytest.mark.trio
async def test_upstream_that_dies_before_its_answer_is_a_502() -> None:
    async with proxied(replying(b"", keep=False)) as (client, _):
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
        assert (await read_all(client)).startswith(b"HTTP/1.1 502 ")


@pytest.mark.trio
async def test_upstream_that_answers_garbage_is_a_502() -> None:
    async with proxied(replying(b"what?\r\n\r\n")) as (client, _):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await read_all(client)).startswith(b"HTTP/1.1 502 ")


@pytest.mark.trio
async def test_upstream_that_dies_in_mid_answer_closes_the_client() -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npartial"
    async with proxied(replying(reply, keep=False)) as (client, _):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await read_all(client) == reply


@pytest.mark.trio
async def test_a_kept_connection_that_died_is_replaced() -> None:
    async with proxied(replying(PLAIN, keep=False)) as (client, seen):
        for _ in range(3):
            await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await read_until(client, b"ok") == PLAIN
        assert len(seen) == 3


@pytest.mark.trio
async def test_no_upstream_is_a_502() -> None:
    gone = listen("127.0.0.1", 0)
    address = gone.getsockname()
    gone.close()
    async with trio.open_nursery() as nursery:
        with listen("127.0.0.1", 0) as listener, trio.fail_after(10):
            nursery.start_soon(Proxy(address).serve, listener)
            async with await trio.open_tcp_stream(*listener.getsockname()) as client:
                await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await read_all(client)).startswith(b"HTTP/1.1 502 ")
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_what_is_not_http_is_a_400_and_an_upgrade_a_501() -> None:
    async with proxied(replying(PLAIN)) as (client, seen):
        await client.send_all(b"garbage\r\n\r\n")
        assert (await read_all(client)).startswith(b"HTTP/1.1 400 ")
        assert seen == []
    async with proxied(replying(PLAIN)) as (client, _):
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n")
        assert (await read_all(client)).startswith(b"HTTP/1.1 501 ")


@pytest.mark.trio
async def test_many_clients_share_the_upstream_connections() -> None:
    async with trio.open_nursery() as nursery:
        connections = 0

        async def upstream(stream: trio.SocketStream) -> None:
            nonlocal connections
            connections += 1
            while await read_until(stream, b"\r\n\r\n"):
                await stream.send_all(PLAIN)

        origin = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        nursery.start_soon(trio.serve_listeners, upstream, [origin])
        with listen("127.0.0.1", 0) as listener, trio.fail_after(10):
            nursery.start_soon(Proxy(origin.socket.getsockname()[:2]).serve, listener)
            async with trio.open_nursery() as clients:

                async def client() -> None:
                    async with await trio.open_tcp_stream(*listener.getsockname()) as stream:
                        for _ in range(20):
                            await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                            assert await read_until(stream, b"ok") == PLAIN

                for _ in range(16):
                    clients.start_soon(client)
            nursery.cancel_scope.cancel()
        assert connections <= 16
