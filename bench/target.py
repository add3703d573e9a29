"""Where a load goes, and what one run of it is to do."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import msgspec

METHOD_CHARACTERS = frozenset("!#$%&'*+-.^_`|~ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")


class BadTarget(ValueError):
    """An address or a header that cannot be used; says what would be right."""


@dataclass(frozen=True, slots=True)
class Target:
    """An address to connect to, and what to ask there."""

    family: int
    address: tuple[str, int] | str
    host: str
    path: str

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected, non-blocking socket. Raises OSError."""
        sock = self.open()
        try:
            sock.settimeout(timeout_s)
            sock.connect(self.address)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        return sock

    def open(self) -> socket.socket:
        """A socket that is not connected yet."""
        sock = socket.socket(self.family, socket.SOCK_STREAM)
        if self.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


def parse_target(url: str) -> Target:
    """http://HOST[:PORT]/PATH, http+unix://%2Fpath%2Fto%2Fsocket/PATH or http+unix:///path/to/socket:/PATH.

    Names are looked up once, here. Raises BadTarget.
    """
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    if parts.scheme == "http+unix":
        if parts.netloc:
            file, path = unquote(parts.netloc), parts.path
        else:
            file, _, path = parts.path.partition(":")
        if not file.startswith("/"):
            raise BadTarget(f"{url!r}: write a Unix socket as http+unix:///path/to/socket:/path/of/url")
        return Target(socket.AF_UNIX, file, "localhost", (path or "/") + query)
    if parts.scheme == "https":
        raise BadTarget(f"{url!r}: only http can be measured; end TLS in front of it")
    if parts.scheme != "http" or not parts.hostname:
        raise BadTarget(f"{url!r} is not a URL: write http://HOST:PORT/PATH")
    try:
        port = parts.port or 80
        family, _, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0]
    except ValueError as exc:
        raise BadTarget(f"{url!r}: {exc}") from None
    except OSError as exc:
        raise BadTarget(f"{parts.hostname!r} is not known: {exc.strerror}") from None
    return Target(
        family, (str(address[0]), int(address[1])), parts.netloc.rpartition("@")[2], (parts.path or "/") + query
    )


def request_bytes(target: Target, method: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """The request as it is sent, over and over. Raises BadTarget for what HTTP does not allow."""
    if not method or not METHOD_CHARACTERS.issuperset(method):
        raise BadTarget(f"{method!r} is not a method")
    if not target.path.isascii() or any(character <= " " for character in target.path):
        raise BadTarget(f"the path {target.path!r} must be percent-encoded")
    given = {name.lower() for name, _ in headers}
    fields = [] if "host" in given else [("Host", target.host)]
    fields += headers
    if (body or method in ("POST", "PUT", "PATCH")) and "content-length" not in given:
        fields.append(("Content-Length", str(len(body))))
    for name, value in fields:
        if not name or not METHOD_CHARACTERS.issuperset(name) or "\r" in value or "\n" in value:
            raise BadTarget(f"{name}: {value} is not a header")
    head = f"{method} {target.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
    return head.encode("latin-1", "replace") + body


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One run of load. Closed loop without a rate: each connection asks again as soon as it is answered."""

    url: str
    method: str = "GET"
    headers: list[tuple[str, str]] = []
    body: bytes = b""
    connections: int = 1
    duration_s: float | None = None
    requests: int | None = None  # the run ends at whichever of the two comes first
    rate: float | None = None  # open loop: requests a second in all
    timeout_s: float = 10.0
    index: int = 0  # which of
    count: int = 1  # how many generator processes this is
