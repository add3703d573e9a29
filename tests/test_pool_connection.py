"""One connection into an instance: both directions, and what may go wrong at each point."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from fake_instance import Peer, Pieces, channel_pair, read_all

from pool.channel import SocketChannel
from pool.connection import Http1Connection, NoAnswer
from pool.errors import BadAnswer, ExchangeError
from pool.wire.http1 import Limits

GET = b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"
HEAD = b"HEAD /a HTTP/1.1\r\nhost: x\r\n\r\n"
PUT_10 = b"PUT /a HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
PUT_CHUNKED = b"PUT /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
OK_3 = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"


@asynccontextmanager
async def connected(limits: Limits | None = None) -> AsyncIterator[tuple[Http1Connection, trio.SocketStream]]:
    channel, stream = channel_pair()
    connection = Http1Connection(channel, limits) if limits else Http1Connection(channel)
    try:
        yield connection, stream
    finally:
        connection.close()
        stream.socket.close()


async def whole_exchange(connection: Http1Connection) -> bytes:
    """The body of the answer to a GET."""
    reader = await connection.exchange(GET, None)
    return reader.take_body() + await read_all(connection)


async def exchange_with(answer: bytes, request: bytes = GET) -> tuple[Http1Connection, int, bytes]:
    """What comes of an answer after which the code closes: (connection, status, body)."""
    async with connected() as (connection, stream):
        await stream.send_all(answer)
        await stream.send_eof()
        reader = await connection.exchange(request, None, head_only=request.startswith(b"HEAD"))
        return connection, reader.status, reader.take_body() + await read_all(connection)


@pytest.mark.trio
async def test_a_small_exchange_is_one_write_and_keeps_the_connection() -> None:
    async with connected() as (connection, stream):
        for _ in range(3):
            await stream.send_all(OK_3)
            reader = await connection.exchange(GET, None)
            assert (reader.status, reader.done, reader.take_body()) == (200, True, b"abc")
            assert await stream.receive_some() == GET
            assert connection.reusable


@pytest.mark.trio
async def test_a_short_body_that_comes_late_is_still_whole() -> None:
    async with connected() as (connection, stream), trio.open_nursery() as nursery:

        async def code() -> None:
            await stream.receive_some()
            for piece in (OK_3[:20], OK_3[20:-3], b"a", b"b", b"c"):
                await stream.send_all(piece)
                await trio.testing.wait_all_tasks_blocked()

        nursery.start_soon(code)
        reader = await connection.exchange(GET, None)
        assert (reader.done, reader.take_body()) == (True, b"abc")


class Hurried(SocketChannel):
    """Counts how often its peer was told at once that bytes arrived."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.times = 0

    def hurry(self) -> None:
        self.times += 1
        super().hurry()


@pytest.mark.trio
@pytest.mark.parametrize(("pieces", "times"), [([OK_3], 0), ([OK_3[:-3], b"abc"], 1), ([OK_3[:9], OK_3[9:]], 1)])
async def test_code_that_writes_an_answer_in_pieces_is_not_kept_waiting_for_an_acknowledgement(
    pieces: list[bytes], times: int
) -> None:
    """Over TCP: its kernel may hold back the second piece until ours has told of the first (40 ms otherwise)."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        channel = Hurried(socket.create_connection(listening.getsockname()))
        accepted, _ = listening.accept()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
    connection = Http1Connection(channel)

    async def code() -> None:
        await stream.receive_some()
        for piece in pieces:
            await stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked(0.01)

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(code)
        assert await whole_exchange(connection) == b"abc"
    assert channel.times == times
    connection.close()


@pytest.mark.trio
async def test_a_large_answer_comes_in_pieces_and_waits_for_its_reader() -> None:
    size = 3_000_000
    sent = 0
    async with connected() as (connection, stream), trio.open_nursery() as nursery:

        async def code() -> None:
            nonlocal sent
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            while sent < size:
                await stream.send_all(b"x" * 10_000)
                sent += 10_000

        nursery.start_soon(code)
        reader = await connection.exchange(GET, None)
        await trio.testing.wait_all_tasks_blocked()
        assert not reader.done
        assert sent < size, "it was all read before anybody wanted it"
        assert len(reader.take_body() + await read_all(connection)) == size
        assert connection.reusable


@pytest.mark.trio
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_is_streamed_to_the_code(chunked: bool) -> None:
    async with connected() as (connection, stream), trio.open_nursery() as nursery:
        peer = Peer(stream)

        async def code() -> None:
            asked = await peer.request()
            assert asked is not None
            assert asked[1] == b"0123456789"
            await peer.answer(201, body=b"made")

        nursery.start_soon(code)
        body = Pieces(b"0123", b"4", b"56789")
        reader = await connection.exchange(PUT_CHUNKED if chunked else PUT_10, body, chunked=chunked)
        assert (reader.status, reader.take_body(), connection.reusable) == (201, b"made", True)


@pytest.mark.trio
async def test_code_may_answer_while_it_is_still_being_sent_to() -> None:
    """An echo: each piece of the body is only there after the one before has come back."""
    echoed = trio.Event()

    class OneByOne:
        left = 4

        async def receive(self) -> bytes:
            nonlocal echoed
            if self.left < 4:
                await echoed.wait()
                echoed = trio.Event()
            self.left -= 1
            return b"piece" if self.left >= 0 else b""

    async with connected() as (connection, stream), trio.open_nursery() as nursery:
        peer = Peer(stream)

        async def code() -> None:
            await peer.event()
            await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while data := getattr(await peer.event(), "data", b""):
                await stream.send_all(b"%x\r\n%b\r\n" % (len(data), data))
            await stream.send_all(b"0\r\n\r\n")

        nursery.start_soon(code)
        reader = await connection.exchange(PUT_CHUNKED, OneByOne(), chunked=True)
        pieces = [data for data in [reader.take_body()] if data]
        if pieces:
            echoed.set()
        while data := await connection.receive():
            pieces.append(data)
            echoed.set()
        assert b"".join(pieces) == b"piece" * 4
        assert connection.reusable


@pytest.mark.trio
async def test_an_answer_before_the_end_of_the_body_stands() -> None:
    class Endless:
        used = 0

        async def receive(self) -> bytes:
            self.used += 1
            await trio.lowlevel.checkpoint()
            return b"x" * 1000

    async with connected() as (connection, stream), trio.open_nursery() as nursery:

        async def code() -> None:
            await stream.receive_some(10)
            await stream.send_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 4\r\n\r\nstop")

        nursery.start_soon(code)
        body = Endless()
        reader = await connection.exchange(PUT_CHUNKED, body, chunked=True)
        assert (reader.status, reader.take_body()) == (413, b"stop")
        assert not connection.reusable
        used = body.used
        await trio.testing.wait_all_tasks_blocked()
        assert body.used == used, "the source is still being read"


@pytest.mark.trio
async def test_code_that_answers_and_closes_without_reading_is_heard() -> None:
    async with connected() as (connection, stream):
        await stream.send_all(b"HTTP/1.1 403 No\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno")
        await stream.aclose()
        reader = await connection.exchange(PUT_10 + b"0123456789", None)
        assert (reader.status, reader.take_body(), connection.reusable) == (403, b"no", False)


@pytest.mark.trio
async def test_what_the_source_raises_is_raised_and_the_connection_is_lost() -> None:
    gone = RuntimeError("the client went away")
    async with connected() as (connection, _):
        with pytest.raises(RuntimeError) as raised:
            await connection.exchange(PUT_10, Pieces(b"012", gone))
        assert raised.value is gone
        assert not connection.reusable


@pytest.mark.trio
async def test_a_source_that_fails_while_the_answer_streams_ends_it() -> None:
    gone = RuntimeError("the client went away")
    begun = trio.Event()

    class Breaks:
        async def receive(self) -> bytes:
            await begun.wait()
            raise gone

    async with connected() as (connection, stream):
        await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n")
        reader = await connection.exchange(PUT_CHUNKED, Breaks(), chunked=True)
        assert reader.take_body() == b"ab"
        begun.set()
        with pytest.raises(RuntimeError):
            await connection.receive()
        assert not connection.reusable


@pytest.mark.trio
async def test_code_that_goes_away_during_an_upload_is_an_error_of_the_instance() -> None:
    async with connected() as (connection, stream), trio.open_nursery() as nursery:

        async def code() -> None:
            await stream.receive_some(10)
            await stream.aclose()

        nursery.start_soon(code)
        with pytest.raises(ExchangeError) as raised:
            await connection.exchange(PUT_CHUNKED, Pieces(*[b"x" * 50_000] * 100), chunked=True)
        assert raised.value.sent
        assert not connection.reusable


ANSWERS = [
    OK_3,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nlink: x\r\n\r\n" + OK_3,
]


@pytest.mark.trio
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("reset", [False, True])
async def test_death_at_every_point_of_an_answer_is_an_error(answer: bytes, reset: bool) -> None:
    for end in range(len(answer)):
        async with connected() as (connection, stream), trio.open_nursery() as nursery:
            # A reset of a socket pair: it closes with bytes unread.
            request = GET if reset else b""

            async def code(stream: trio.SocketStream = stream, end: int = end, unread: bytes = request) -> None:
                if not unread:
                    await stream.receive_some()
                await stream.send_all(answer[:end])
                await stream.aclose()

            nursery.start_soon(code)
            with pytest.raises(ExchangeError) as raised:
                await whole_exchange(connection)
            assert raised.value.sent
            assert isinstance(raised.value, NoAnswer) == (end == 0)
            assert not isinstance(raised.value, BadAnswer), "what breaks off is no garbage"
            assert not connection.reusable


@pytest.mark.trio
async def test_a_real_reset_is_an_error() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        from pool.channel import SocketChannel

        client = socket.create_connection(listener.getsockname())
        served, _ = listener.accept()
        connection = Http1Connection(SocketChannel(client))
        served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        served.close()
        with pytest.raises(NoAnswer):
            await connection.exchange(GET, None)
        connection.close()


@pytest.mark.trio
async def test_a_body_that_ends_with_the_connection_may_end_anywhere() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n\r\n"
    for body in (b"", b"abc", b"x" * 200_000):
        async with connected() as (connection, stream), trio.open_nursery() as nursery:

            async def code(stream: trio.SocketStream = stream, body: bytes = body) -> None:
                await stream.receive_some()
                await stream.send_all(answer + body)
                await stream.aclose()

            nursery.start_soon(code)
            reader = await connection.exchange(GET, None)
            assert reader.take_body() + await read_all(connection) == body
            assert not connection.reusable


@pytest.mark.trio
@pytest.mark.parametrize("answer", ANSWERS)
async def test_interim_answers_are_passed_over(answer: bytes) -> None:
    _, status, body = await exchange_with(answer)
    assert (status, body) == (200, b"abc")


@pytest.mark.trio
async def test_switching_protocols_is_refused() -> None:
    with pytest.raises(BadAnswer, match="switches protocols"):
        await exchange_with(b"HTTP/1.1 101 Up\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nxyz")


@pytest.mark.trio
@pytest.mark.parametrize("framing", [b"Content-Length: 500", b"Transfer-Encoding: chunked"])
async def test_the_answer_to_a_head_has_no_body_and_keeps_the_connection(framing: bytes) -> None:
    async with connected() as (connection, stream):
        await stream.send_all(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % framing)
        reader = await connection.exchange(HEAD, None, head_only=True)
        assert (reader.status, reader.done, reader.take_body()) == (200, True, b"")
        assert connection.reusable
        await stream.send_all(OK_3)
        reader = await connection.exchange(GET, None)
        assert (reader.status, reader.take_body()) == (200, b"abc")


@pytest.mark.trio
async def test_a_body_after_a_head_is_not_taken_for_anything() -> None:
    connection, status, body = await exchange_with(OK_3, HEAD)
    assert (status, body, connection.reusable) == (200, b"", False)


@pytest.mark.trio
@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_body_by_their_status(status: int) -> None:
    async with connected() as (connection, stream):
        await stream.send_all(b"HTTP/1.1 %d No\r\netag: 1\r\n\r\n" % status)
        reader = await connection.exchange(GET, None)
        assert (reader.status, reader.done, reader.take_body()) == (status, True, b"")
        assert connection.reusable
        await stream.send_all(OK_3)
        assert (await connection.exchange(GET, None)).take_body() == b"abc"


@pytest.mark.trio
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        OK_3 + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond",
        OK_3 + b"HTTP/1.1 20",
        OK_3 + b"garbage",
    ],
)
async def test_an_answer_stands_but_costs_the_connection(answer: bytes) -> None:
    connection, status, body = await exchange_with(answer)
    assert (status, body, connection.reusable) == (200, b"abc", False)


@pytest.mark.trio
@pytest.mark.parametrize(
    "answer",
    [
        b"220 mail.example ESMTP ready\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_garbage_is_named_as_such(answer: bytes) -> None:
    with pytest.raises(BadAnswer):
        await exchange_with(answer)


@pytest.mark.trio
@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 ", b"HTTP/1.1 100 Go\r\n\r\n"]
)
async def test_a_head_without_end_is_refused_while_it_arrives(head: bytes) -> None:
    more = {b"\n": b"a: b\r\n", b" ": b"v" * 100}[head[-1:]] if b"100" not in head else head
    limits = Limits(header_count=50, header_bytes=2000)
    async with connected(limits) as (connection, stream), trio.open_nursery() as nursery:

        async def code() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(head)
                while True:
                    await stream.send_all(more * 20)

        nursery.start_soon(code)
        with pytest.raises(BadAnswer):
            await connection.exchange(GET, None)
        connection.close()


@pytest.mark.trio
async def test_a_cancelled_exchange_leaves_the_connection_unusable() -> None:
    async with connected() as (connection, _):
        with trio.move_on_after(0):
            await connection.exchange(GET, None)
        assert not connection.reusable
        body = Pieces(*[b"x"] * 10)
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.exchange(PUT_CHUNKED, body, chunked=True)
        assert scope.cancelled_caught
        asked = body.asked
        await trio.testing.wait_all_tasks_blocked()
        assert body.asked == asked, "the source is still being read"


@pytest.mark.trio
async def test_a_cancelled_receive_loses_nothing() -> None:
    async with connected() as (connection, stream):
        await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await connection.exchange(GET, None)
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.receive()
        await stream.send_all(b"3\r\nabc\r\n0\r\n\r\n")
        assert await read_all(connection) == b"abc"
        assert connection.reusable


@pytest.mark.trio
async def test_a_connection_at_rest_knows_that_it_was_closed() -> None:
    async with connected() as (connection, stream):
        assert not connection.gone()
        await stream.send_all(b"HTTP/1.1 408 Timeout\r\n\r\n")
        assert connection.gone()
    async with connected() as (connection, stream):
        await stream.aclose()
        assert connection.gone()
