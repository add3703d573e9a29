"""Sockets inside another process's network namespace.

A socket belongs for life to the namespace it was created in, so a thread enters, creates it, and ends; connecting
and listening then happen in the trio thread as with any socket. Each entry has a thread of its own: one that could
not get back would otherwise serve strangers from the wrong network.

A daemon without CAP_SYS_ADMIN can still enter the namespaces it owns (those of its own user namespaces), but only in
a process with a single thread: pool/nschild.py is that process and passes the sockets back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import outcome
import trio

from pool.channel import SocketChannel
from pool.errors import BackendUnavailable, ChannelClosed
from pool.nschild import CLONE_NEWNET, loopback_up, setns

T = TypeVar("T")

CAP_SYS_ADMIN = 21
NS_GET_USERNS = 0xB701  # ioctl_ns(2): the user namespace that owns this one
SOCKETS_PER_CHILD = 4  # a child costs some 20 ms, a further socket nothing
CHILD_TIMEOUT_S = 10.0
BACKLOG = 128
_HINT = (
    "run poold as root or give it CAP_SYS_ADMIN and CAP_SYS_PTRACE "
    "(poold.service has them in AmbientCapabilities), or use a network whose instances have an address"
)


def can_enter() -> bool:
    """True when this process may enter any network namespace of the host: CAP_SYS_ADMIN is in effect."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    return False


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class NetNamespace:
    """One network namespace, held by a descriptor: it stays the same one whatever becomes of the process."""

    __slots__ = ("_entry_lock", "_fd", "_stock", "_user_fd")

    def __init__(self, fd: int, user_fd: int | None) -> None:
        """Use open(). `user_fd`: the owning user namespace, when it has to be joined first (no CAP_SYS_ADMIN)."""
        self._fd = fd
        self._user_fd = user_fd
        self._stock: list[socket.socket] = []  # spare IPv4 sockets of the last child, at most SOCKETS_PER_CHILD
        self._entry_lock = trio.Lock()  # one entry at a time for a namespace, so a burst makes one child

    @classmethod
    def open(cls, pid: int, *, privileged: bool | None = None) -> NetNamespace:
        """Hold the namespace that process `pid` is in now. Close it: it keeps the namespace alive.

        `privileged` None: what can_enter() says. Raises BackendUnavailable when there is no such process or the
        kernel refuses.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = -1
        try:
            fd = os.open(f"/proc/{pid}/ns/net", flags)
            user_fd = None
            if not (can_enter() if privileged is None else privileged):
                user_fd = fcntl.ioctl(fd, NS_GET_USERNS)
        except OSError as exc:
            if fd >= 0:
                os.close(fd)
            if exc.errno in (errno.ENOENT, errno.ESRCH):
                raise BackendUnavailable(f"process {pid} has ended, its network namespace cannot be entered") from exc
            raise _refused(exc) from exc
        return cls(fd, user_fd)

    def close(self) -> None:
        """Let go of the namespace; its sockets stay open. Safe to call twice."""
        for sock in self._stock:
            sock.close()
        self._stock.clear()
        for fd in (self._fd, self._user_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._user_fd = -1, None

    async def dial(self, host: str, port: int, timeout_s: float = 5.0) -> SocketChannel:
        """Connect to the numeric address `host`, `port` in there.

        Raises ChannelClosed when nothing listens or nothing answered in timeout_s, BackendUnavailable when the
        namespace cannot be entered. When cancelled, the socket is closed.
        """
        return await connect(await self._socket(_family(host)), host, port, timeout_s)

    async def listen(self, host: str, port: int) -> trio.SocketListener:
        """Listen on the numeric address `host`, `port` in there (port 0: a free one).

        Raises OSError when the port is taken, BackendUnavailable when the namespace cannot be entered.
        """
        sock = await self._socket(_family(host))
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(BACKLOG)
            return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        except BaseException:
            sock.close()
            raise

    async def raise_loopback(self) -> None:
        """Set its loopback interface up, as a new namespace needs. Raises BackendUnavailable."""
        async with self._entry_lock:
            if self._user_fd is None:
                await self._in_thread(loopback_up)
            else:
                await self._in_child(socket.AF_INET, 0, raise_loopback=True)

    async def _socket(self, family: socket.AddressFamily) -> socket.socket:
        async with self._entry_lock:
            if self._user_fd is None:
                return await self._in_thread(
                    lambda: socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
                )
            if family != socket.AF_INET:
                return (await self._in_child(family, 1))[0]
            if not self._stock:
                self._stock.extend(await self._in_child(family, SOCKETS_PER_CHILD))
            return self._stock.pop()

    async def _in_thread(self, make: Callable[[], T]) -> T:
        """Run `make` in the namespace, in a thread that ends right after. Not cancelled half-way: it is short."""
        if self._fd < 0:
            raise BackendUnavailable("the network namespace was closed: its instance has ended")
        fd = self._fd
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()
        results: list[outcome.Outcome[T]] = []

        def enter() -> T:
            own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(fd, CLONE_NEWNET)
                try:
                    return make()
                finally:
                    # The thread ends anyway; going back keeps it from holding the namespace until it has.
                    with contextlib.suppress(OSError):
                        setns(own, CLONE_NEWNET)
            finally:
                os.close(own)

        def run() -> None:
            results.append(outcome.capture(enter))
            token.run_sync_soon(done.set)

        threading.Thread(target=run, name="poold-netns", daemon=True).start()
        with trio.CancelScope(shield=True):
            await done.wait()
        try:
            return results[0].unwrap()
        except OSError as exc:
            raise _refused(exc) from exc

    async def _in_child(
        self, family: socket.AddressFamily, count: int, *, raise_loopback: bool = False
    ) -> list[socket.socket]:
        """Let pool/nschild.py make `count` sockets in the namespace. When cancelled, the child is killed."""
        if self._fd < 0 or self._user_fd is None:
            raise BackendUnavailable("the network namespace was closed: its instance has ended")
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        except OSError as exc:
            raise _refused(exc) from exc
        with ours, theirs:
            fds = (self._user_fd, self._fd, theirs.fileno())
            script = Path(__file__).with_name("nschild.py")
            arguments = [*fds, int(family), count, int(raise_loopback)]
            command = [sys.executable, "-I", "-S", str(script), *map(str, arguments)]
            with trio.move_on_after(CHILD_TIMEOUT_S) as limit:
                child = await trio.run_process(
                    command, pass_fds=fds, capture_stderr=True, check=False, stdin=subprocess.DEVNULL
                )
            if limit.cancelled_caught:
                raise BackendUnavailable(f"entering a network namespace took longer than {CHILD_TIMEOUT_S:g} s")
            if child.returncode != 0:
                detail = child.stderr.decode(errors="replace").strip().splitlines()
                raise BackendUnavailable(
                    f"cannot enter the instance's network namespace: {detail[-1] if detail else 'no reason given'}",
                    hint=_HINT,
                )
            if count == 0:
                return []
            _, received, _, _ = socket.recv_fds(ours, 1, count, socket.MSG_DONTWAIT)
            return [socket.socket(fileno=fd) for fd in received]


async def connect(sock: socket.socket, host: str, port: int, timeout_s: float) -> SocketChannel:
    """Connect a non-blocking socket, which it closes when that fails. Raises ChannelClosed."""
    try:
        with trio.move_on_after(timeout_s) as limit:
            code = sock.connect_ex((host, port))
            if code == errno.EINPROGRESS:
                await trio.lowlevel.wait_writable(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise ChannelClosed(f"cannot connect to {host}:{port}: {os.strerror(code)}")
        if limit.cancelled_caught:
            raise ChannelClosed(f"no answer from {host}:{port} in {timeout_s:g} s")
        return SocketChannel(sock)
    except BaseException:
        sock.close()
        raise


def _refused(exc: OSError) -> BackendUnavailable:
    return BackendUnavailable(f"cannot enter the instance's network namespace: {exc.strerror or exc}", hint=_HINT)
