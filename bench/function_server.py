#!/usr/bin/python3
"""The function that the benchmarks measure: a fixed answer, as fast as the standard library alone can give it.

It is copied as `bootstrap` into a code function (so it must run on the host's own Python, without any package) and,
for the direct comparison, run as a plain process. One thread, raw epoll, HTTP/1.1 with keep-alive.
It listens on HOST:PORT from the environment (default 0.0.0.0:9000; port 0 picks one) and prints the address.
"""

from __future__ import annotations

import os
import select
import socket
import sys

BODY = b"poold\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(BODY)
ANSWER = HEAD + BODY
BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
MAX_REQUEST_BYTES = 1 << 26


def length_of(buffer: bytes) -> int:
    """Bytes of the first request in `buffer`; 0 when it is not all there yet; -1 when it cannot be read."""
    head_end = buffer.find(b"\r\n\r\n")
    if head_end < 0:
        return 0 if len(buffer) <= 65536 else -1
    end = head_end + 4
    head = buffer[:end].lower()
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        digits = head[at + 17 : head.find(b"\r\n", at + 17)].strip()
        if not digits.isdigit() or int(digits) > MAX_REQUEST_BYTES:
            return -1
        end += int(digits)
        return end if len(buffer) >= end else 0
    if b"\r\ntransfer-encoding:" in head:
        return end_of_chunks(buffer, end)
    return end


def end_of_chunks(buffer: bytes, at: int) -> int:
    """Where a chunked body that begins at `at` ends (trailers are not expected); 0 and -1 as length_of."""
    while True:
        line_end = buffer.find(b"\r\n", at)
        if line_end < 0:
            return 0
        try:
            size = int(buffer[at:line_end].split(b";")[0], 16)
        except ValueError:
            return -1
        at = line_end + 2 + size + 2
        if at > MAX_REQUEST_BYTES:
            return -1
        if len(buffer) < at:
            return 0
        if size == 0:
            return at


class Connection:
    """One client: what it sent and is not answered yet, what it has not taken yet."""

    __slots__ = ("closing", "inbound", "outbound", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbound = b""
        self.outbound = b""
        self.closing = False

    def on_bytes(self) -> bool:
        """Read, answer what is complete. False when the connection is over."""
        try:
            data = self.sock.recv(262144)
        except BlockingIOError:
            return True
        if not data:
            return False
        buffer = self.inbound + data if self.inbound else data
        while buffer:
            size = length_of(buffer)
            if size == 0:
                break
            self.outbound += ANSWER if size > 0 else BAD
            if size < 0:
                self.closing = True
                break
            buffer = buffer[size:]
        self.inbound = buffer
        return self.flush()

    def flush(self) -> bool:
        """Send what is owed. False when the connection is over."""
        if self.outbound:
            try:
                sent = self.sock.send(self.outbound)
            except BlockingIOError:
                sent = 0
            self.outbound = self.outbound[sent:]
        return bool(self.outbound) or not self.closing


def serve(listener: socket.socket) -> None:
    """Answer until the process is ended."""
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener.fileno(), select.EPOLLIN)
    connections: dict[int, Connection] = {}
    while True:
        for fd, event in poll.poll():
            if fd == listener.fileno():
                try:
                    sock, _ = listener.accept()
                except OSError:
                    continue
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[sock.fileno()] = Connection(sock)
                poll.register(sock.fileno(), select.EPOLLIN)
                continue
            connection = connections[fd]
            try:
                alive = connection.flush() if event == select.EPOLLOUT else connection.on_bytes()
                poll.modify(fd, select.EPOLLOUT) if connection.outbound else None
                if event == select.EPOLLOUT and not connection.outbound:
                    poll.modify(fd, select.EPOLLIN)
            except OSError:
                alive = False
            if not alive:
                poll.unregister(fd)
                connections.pop(fd).sock.close()


def main() -> None:
    """Listen and serve."""
    host = os.environ.get("HOST", "0.0.0.0")
    port = int(os.environ.get("PORT", "9000"))
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(1024)
    sys.stdout.write("listening on {}:{}\n".format(*listener.getsockname()))
    sys.stdout.flush()
    serve(listener)


if __name__ == "__main__":
    main()
