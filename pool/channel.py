"""A byte stream to one peer, cheap enough for the invocation path.

Trio's own socket methods run a checkpoint after each call that did not block; on the invocation path that is a
third of the cost. Here a call that can go through at once does so without a checkpoint, and the wait for the
answer, which every exchange has, is the checkpoint.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Protocol

import trio

from pool.errors import ChannelClosed

RECEIVE_BYTES = 65_536


class Channel(Protocol):
    """A connected byte stream. One task sends and one receives at a time."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. Returns without a checkpoint when the kernel takes it at once.

        Raises ChannelClosed. When cancelled, part of the data may have been sent.
        """

    def try_send(self, data: bytes) -> int:
        """Send what can be sent at once; how many bytes that was. For the invocation path: no coroutine.

        Raises ChannelClosed. What is left goes to send_all()."""

    async def receive(self) -> bytes:
        """Wait for bytes; b"" at the end of the stream. Raises ChannelClosed on a reset. Cancelling loses nothing."""

    def hurry(self) -> None:
        """More is about to come from a peer that may hold it back until it knows that the last bytes arrived: tell it
        now. (Nagle's algorithm there and a delayed acknowledgement here make 40 ms of two small writes.)"""

    def peer_gone(self) -> bool:
        """True when the peer has already closed, or has sent something nobody asked for (for a connection at rest)."""

    def close(self) -> None:
        """Close now. Safe to call twice."""


class Load:
    """How many requests are being answered now. Whoever answers them keeps it; channels choose by it how to wait."""

    requests = 0


load = Load()


class SocketChannel:
    """A channel over a non-blocking stream socket, which it owns."""

    __slots__ = ("_closed", "_recv", "_send", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._recv = sock.recv
        self._send = sock.send
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See Channel.send_all."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._send(view) :]
            except BlockingIOError:
                await self._wait_writable()
            except OSError as exc:
                raise ChannelClosed(str(exc)) from exc

    async def _wait_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self.sock)
        except (OSError, trio.ClosedResourceError) as exc:
            raise ChannelClosed(str(exc)) from exc

    def try_send(self, data: bytes) -> int:
        """See Channel.try_send."""
        try:
            return self._send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise ChannelClosed(str(exc)) from exc

    async def receive(self) -> bytes:
        """See Channel.receive.

        When several requests are being answered, the bytes are mostly there once the other tasks have had their turn,
        which costs less than asking the kernel to tell when they are. Alone they never are.
        """
        busy = load.requests > 1
        while True:
            try:
                if busy:
                    busy = False
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.lowlevel.wait_readable(self.sock)
                return self._recv(RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError) as exc:
                raise ChannelClosed(str(exc)) from exc

    def hurry(self) -> None:
        """See Channel.hurry. Asked for each time: the kernel goes back to delaying by itself (tcp(7))."""
        if self.sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def peer_gone(self) -> bool:
        """See Channel.peer_gone."""
        try:
            self._recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def unread(self) -> bool:
        """True when bytes have come that nobody has received yet."""
        try:
            return bool(self._recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def hung_up(self) -> bool:
        """True when the peer has closed (or shut down its sending side) and nothing it sent is left unread."""
        try:
            return not self._recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def end_sending(self) -> None:
        """The peer has been sent all; it may go on sending."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See Channel.close."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self.sock)
            with contextlib.suppress(OSError):
                self.sock.close()
