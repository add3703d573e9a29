"""A running instance for tests of contracts: what it serves is an async function on a socket pair."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import h11
import trio

from pool.backends.base import Running, Usage
from pool.channel import Channel, SocketChannel
from pool.contracts.base import Link
from pool.errors import ChannelClosed
from pool.logs import InstanceLog
from pool.spec import Artifact, FunctionSpec, make_revision


def channel_pair() -> tuple[SocketChannel, trio.SocketStream]:
    """Our end, and the code's end."""
    ours, theirs = socket.socketpair()
    return SocketChannel(ours), trio.SocketStream(trio.socket.from_stdlib_socket(theirs))


class Peer:
    """The code's side of one connection, spoken by h11: an implementation that is not ours."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.SERVER)

    async def event(self) -> Any:
        """The next thing that h11 makes of what arrives; None at the end."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            try:
                self.http.receive_data(await self.stream.receive_some(65536))
            except trio.BrokenResourceError:
                return None
        return None if isinstance(event, h11.ConnectionClosed) else event

    async def request(self) -> tuple[h11.Request, bytes] | None:
        """The next whole request and its body; None when there is no more."""
        if self.http.our_state is h11.DONE:
            self.http.start_next_cycle()
        request = await self.event()
        if not isinstance(request, h11.Request):
            return None
        body = b""
        while isinstance(event := await self.event(), h11.Data):
            body += event.data
        return request, body

    async def answer(self, status: int = 200, headers: list[tuple[str, str]] | None = None, body: bytes = b"") -> None:
        """Send a whole answer."""
        sent = [*(headers or []), ("content-length", str(len(body)))]
        data = self.http.send(h11.Response(status_code=status, headers=sent, reason=b"Answer"))
        data += (self.http.send(h11.Data(data=body)) if body else b"") + self.http.send(h11.EndOfMessage())
        await self.stream.send_all(data)


Serve = Callable[[trio.SocketStream], Awaitable[None]]


class FakeInstance:
    """A Running whose code is `serve`, called for each connection."""

    def __init__(self, nursery: trio.Nursery, serve: Serve) -> None:
        self._nursery = nursery
        self._serve = serve
        self.instance_id = "i-1"
        self.can_freeze = True
        self.pid: int | None = None
        self.exited: str | None = None
        self.refused = 0  # connections to refuse before it listens
        self.dials = 0
        self.port: int | None = None

    async def dial(self, port: int) -> Channel:
        await trio.lowlevel.checkpoint()
        self.dials += 1
        self.port = port
        if self.exited is not None or self.refused > 0:
            self.refused -= 1
            raise ChannelClosed("connection refused")
        ours, theirs = channel_pair()
        self._nursery.start_soon(self._run, theirs)
        return ours

    async def _run(self, stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):  # our side closed first
                await self._serve(stream)

    async def listen(self, port: int) -> trio.SocketListener:
        raise AssertionError("a push contract does not listen")

    async def freeze(self) -> None:
        raise AssertionError("a session does not freeze")

    async def thaw(self) -> None:
        raise AssertionError("a session does not thaw")

    async def sample(self) -> Usage:
        return Usage(1.0, 0.0)

    async def stop(self, grace_s: float) -> None:
        raise AssertionError("a session does not stop its instance")


def link_to(running: Running, spec: FunctionSpec, port: int = 9000) -> Link:
    """What a session gets."""
    revision = make_revision(spec, Artifact(digest="sha256:0"))
    return Link(revision, running, port, InstanceLog(running.instance_id))


class Pieces:
    """A body that comes in these pieces; an exception among them is raised."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = list(pieces)
        self.asked = 0

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece


async def read_all(source: Any) -> bytes:
    """The rest of a body."""
    parts = []
    while data := await source.receive():
        parts.append(data)
    return b"".join(parts)
