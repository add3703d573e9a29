"""What systemd tells a service and what a service tells systemd: readiness, the watchdog, sockets handed over.

Sources: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). Standard library only; every call is short and does
not block. Outside systemd the variables are unset and each function says so by its return value.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

FIRST_FD = 3  # SD_LISTEN_FDS_START


class SystemdError(Exception):
    """systemd's side of the bargain is not kept: the message names the variable, its value and what was expected."""


def notify(state: str) -> bool:
    """Send `state` ("READY=1", "STATUS=...", "WATCHDOG=1", several lines at a time) to the service's supervisor.

    False when there is none (NOTIFY_SOCKET is unset), or when it does not take it now: gone, or full. That is no
    reason for a service to end. Raises SystemdError when NOTIFY_SOCKET is no address.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address[0] not in "/@" or len(address) < 2:
        raise SystemdError(
            f"NOTIFY_SOCKET is {address!r}: an absolute path, or @ and a name for an abstract socket, was expected"
        )
    target = "\0" + address[1:] if address[0] == "@" else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.connect(target)
            sock.sendall(state.encode())
        except OSError:
            return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to send WATCHDOG=1, in seconds: half the limit after which systemd ends the service.

    None when no watchdog is set for this process. Raises SystemdError when WATCHDOG_USEC is no positive number.
    """
    value = os.environ.get("WATCHDOG_USEC")
    if not value or not _meant_for_us("WATCHDOG_PID"):
        return None
    limit_us = _number("WATCHDOG_USEC", value)
    if limit_us < 1:
        raise SystemdError(f"WATCHDOG_USEC is {value!r}: a number of microseconds above 0 was expected")
    return limit_us / 1_000_000 / 2


def inherited_sockets() -> list[socket.socket]:
    """The listening stream sockets that socket activation handed over, in the order of the unit's lines.

    Tell them apart by `family`: AF_UNIX or AF_INET/AF_INET6. Empty when there are none, or when they were meant for
    another process. The variables are removed, so that no child believes they are its own, and a second call gives
    nothing. Raises SystemdError, with every descriptor closed, when one is not a listening stream socket.
    """
    value, names = os.environ.get("LISTEN_FDS"), os.environ.get("LISTEN_FDNAMES", "")
    ours = _meant_for_us("LISTEN_PID")
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if not value or not ours:
        return []
    count = _number("LISTEN_FDS", value)
    labels = names.split(":") if names else []
    if labels and len(labels) != count:
        _close(range(FIRST_FD, FIRST_FD + count))
        raise SystemdError(f"LISTEN_FDS is {count} but LISTEN_FDNAMES has {len(labels)} names: {names!r}")
    sockets: list[socket.socket] = []
    try:
        for offset in range(count):
            sockets.append(_adopt(FIRST_FD + offset, labels[offset] if labels else "unknown"))
    except SystemdError:
        for sock in sockets:
            sock.close()
        _close(range(FIRST_FD + len(sockets), FIRST_FD + count))
        raise
    return sockets


def _close(descriptors: range) -> None:
    for fd in descriptors:
        with suppress(OSError):
            os.close(fd)


def _adopt(fd: int, name: str) -> socket.socket:
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError as exc:
        raise SystemdError(f"descriptor {fd} ({name}) of LISTEN_FDS is not open: {exc.strerror}") from exc
    if not is_socket:
        raise SystemdError(f"descriptor {fd} ({name}) of LISTEN_FDS is not a socket; use ListenStream= only")
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not listening:
        sock.close()
        raise SystemdError(f"descriptor {fd} ({name}) of LISTEN_FDS does not listen; use ListenStream= and Accept=no")
    sock.setblocking(False)
    return sock


def _meant_for_us(variable: str) -> bool:
    """A child of the service inherits the variables; the process id in them says whom they are for."""
    value = os.environ.get(variable)
    return not value or _number(variable, value) == os.getpid()


def _number(variable: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise SystemdError(f"{variable} is {value!r}: a whole number was expected")
    return int(value)
