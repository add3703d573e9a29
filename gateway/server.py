"""The HTTP server: listeners, connections up to a limit, an orderly end."""

from __future__ import annotations

import errno
import socket

import structlog
import trio

from gateway.connection import Answer, Connection
from gateway.errors import ApiError
from gateway.limits import ServerLimits
from gateway.listeners import Listener
from gateway.sweeper import Sweeper
from pool.channel import SocketChannel

log = structlog.get_logger("poold.http")

TOLD_AT_ONCE = 64  # connections beyond the limit that are told so; more are only closed, for each of these is one too
KEPT_FOR_TRUSTED = 128  # more than those told, so that a flood over TCP does not keep out who administers
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Server:
    """Serves connections of its listeners with one answer function."""

    def __init__(self, listeners: list[Listener], answer: Answer, limits: ServerLimits) -> None:
        self.listeners = listeners
        self.limits = limits  # may be replaced; new connections get the new ones
        self.closing = False
        self._answer = answer
        self._sweeper = Sweeper()
        self.closed = trio.Event()  # after close(): every connection has ended
        self._accepting = trio.CancelScope()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._sweeper.all)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or until close() and the last connection's end."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweeper.run)
                async with trio.open_nursery() as clients:
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for listener in self.listeners:
                                acceptors.start_soon(self._accept, listener, clients)
                            task_status.started()
                    self._close_listeners()
                nursery.cancel_scope.cancel()
            self.closed.set()
        finally:
            self._close_listeners()

    def close(self) -> None:
        """Accept no more; connections end with their present request, those at rest now."""
        self.closing = True
        self._accepting.cancel()
        for connection in self._sweeper.all:
            connection.end_if_idle()

    async def _accept(self, listener: Listener, clients: trio.Nursery) -> None:
        sock = listener.sock
        sock.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                client, address = sock.accept()
            except OSError as exc:
                if exc.errno in OUT_OF_FILES:
                    log.error("cannot accept a connection", error=str(exc), hint="raise LimitNOFILE (ulimit -n)")
                    await trio.sleep(0.1)
                continue  # the client went before it was accepted
            most = self.limits.max_connections + (KEPT_FOR_TRUSTED if listener.trusted else 0)
            if len(self._sweeper.all) >= most + TOLD_AT_ONCE:
                client.close()
                continue
            ip = address[0].encode() if listener.path is None and sock.family != socket.AF_UNIX else b""
            connection = Connection(
                SocketChannel(client), self.limits, self._sweeper, client_ip=ip, trusted=listener.trusted
            )
            if len(self._sweeper.all) >= most:
                clients.start_soon(connection.serve, _refuse, lambda: True)
            else:
                clients.start_soon(connection.serve, self._answer, self._is_closing)

    def _is_closing(self) -> bool:
        return self.closing

    def _close_listeners(self) -> None:
        for listener in self.listeners:
            listener.close()


async def _refuse(request: object, connection: Connection) -> None:
    raise ApiError(
        503,
        "too_many_connections",
        "the server has as many connections as it takes",
        hint="raise max_connections under [http]",
        retry_after_s=1,
    )
