"""The sockets that are listened on: made here, or handed over by systemd."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from gateway import systemd
from gateway.config import HttpSection

BACKLOG = 1024


class ListenError(Exception):
    """An address cannot be listened on: which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket. `trusted`: who reaches it may administer. `path`: a Unix socket's, ours to remove."""

    sock: socket.socket
    trusted: bool
    path: Path | None = None

    def address(self) -> str:
        """http://host:port or unix:///path."""
        name = self.sock.getsockname()
        if self.sock.family == socket.AF_UNIX:
            return f"unix://{name}"
        host, port = name[0], name[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        """Close it, and remove a Unix socket that is ours."""
        if self.sock.fileno() >= 0:
            self.sock.close()
            if self.path is not None:
                with contextlib.suppress(OSError):
                    self.path.unlink()


def open_listeners(http: HttpSection) -> list[Listener]:
    """Sockets of systemd's, if it handed some over, else those configured. Raises ListenError, SystemdError."""
    inherited = systemd.inherited_sockets()
    if inherited:
        # A Unix socket's access mode is systemd's to set, and decides who may administer.
        return [Listener(sock, trusted=sock.family == socket.AF_UNIX) for sock in inherited]
    listeners: list[Listener] = []
    try:
        if http.socket:
            listeners.append(listen_unix(Path(http.socket), int(http.socket_mode, 8)))
        listeners += [listen_tcp(address) for address in http.listen]
        if not listeners:
            raise ListenError("nothing to listen on: set socket or listen under [http]")
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def listen_tcp(address: str) -> Listener:
    """Listen on HOST:PORT (port 0: a free one). Raises ListenError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        number = int(port)
        info = socket.getaddrinfo(host or "127.0.0.1", number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        sock = socket.create_server(info[0][4][:2], family=info[0][0], backlog=BACKLOG)
    except (ValueError, OverflowError, OSError) as exc:
        raise ListenError(f"cannot listen on {address}: {_why(exc)}") from exc
    return Listener(sock, trusted=False)


def _why(exc: Exception) -> str:
    other = "choose another with --listen or the key listen under [http]"
    if isinstance(exc, socket.gaierror) or not isinstance(exc, OSError) or exc.errno is None:
        return (getattr(exc, "strerror", "") or str(exc)).lower()
    if exc.errno == errno.EADDRINUSE:
        return f"something listens there already; {other}"
    if exc.errno == errno.EADDRNOTAVAIL:
        return f"this host has no such address; {other}"
    if exc.errno == errno.EACCES:
        return f"a port below 1024 needs root (or CAP_NET_BIND_SERVICE); {other}"
    return os.strerror(exc.errno).lower()


def listen_unix(path: Path, mode: int) -> Listener:
    """Listen on a Unix socket, replacing one that nobody answers. Raises ListenError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(path))
                except OSError:
                    path.unlink()
                else:
                    raise ListenError(f"another poold answers on {path}: stop it first, or give --socket another path")
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise ListenError(f"cannot listen on the socket {path}: {exc.strerror or exc}") from exc
    except ListenError:
        sock.close()
        raise
    return Listener(sock, trusted=True, path=path)
