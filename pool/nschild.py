"""A short-lived process that makes sockets in a user namespace's network namespace and passes them to its parent.

Run as a script by pool/netns.py: a user namespace can only be joined by a process with one thread. It uses the
standard library alone, so that it starts quickly. Arguments, all numbers: the descriptors of the user
namespace, the network namespace and the socket to answer on; the address family; how many sockets; 1 to set the
loopback interface up. Exit code 1 and a line on stderr when the kernel refuses.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # netdevice(7)


_libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12


def setns(fd: int, kind: int) -> None:
    """Move the calling thread to the namespace `fd` stands for. Raises OSError."""
    if _libc.setns(fd, kind) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def loopback_up() -> None:
    """Set the loopback interface of the calling thread's network namespace up. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", answer)[1]
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def main() -> None:
    """Join, make, pass on, end."""
    user_fd, net_fd, answer_fd, family, count, loopback = map(int, sys.argv[1:])
    try:
        setns(user_fd, CLONE_NEWUSER)
        setns(net_fd, CLONE_NEWNET)
        if loopback:
            loopback_up()
        if count:
            made = [socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(count)]
            with socket.socket(fileno=answer_fd) as answer:
                socket.send_fds(answer, [b"s"], [sock.fileno() for sock in made])
    except OSError as exc:
        sys.exit(exc.strerror or str(exc))


if __name__ == "__main__":
    main()
