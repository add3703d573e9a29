"""What the server hands to a route, and what a route hands back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from gateway.errors import ApiError
from pool.contracts.base import BodySource, Headers


@dataclass(slots=True)
class Request:
    """One HTTP request. `body` is what came with the head; the rest, if any, comes from `stream`."""

    method: bytes
    target: bytes  # path?query as received
    path: bytes  # still percent-encoded
    query: bytes
    headers: Headers  # names as received
    client_ip: bytes = b""  # b"" on a Unix socket
    trusted: bool = False  # it came by a socket that may administer
    body: bytes = b""
    stream: BodySource | None = None
    length: int | None = None  # declared by Content-Length

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        for key, value in self.headers:
            if key.lower() == name:
                return value
        return None

    def query_values(self) -> dict[str, str]:
        """The query's last value for each name, decoded."""
        pairs = parse_qs(self.query.decode("ascii", "replace"), keep_blank_values=True)
        return {name: values[-1] for name, values in pairs.items()}

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises ApiError 413 when it is larger."""
        parts = [self.body]
        size = len(self.body)
        while self.stream is not None and size <= limit_bytes:
            part = await self.stream.receive()
            if not part:
                break
            parts.append(part)
            size += len(part)
        if size > limit_bytes:
            raise ApiError(413, "body_too_large", f"the body is larger than {limit_bytes} bytes")
        return b"".join(parts)


@dataclass(slots=True)
class Response:
    """An answer. A body that is an iterator is sent as it comes (chunked) and closed when the client goes away."""

    status: int
    body: bytes | AsyncIterator[bytes] = b""
    content_type: bytes = b"application/json"
    headers: Headers = field(default_factory=list)
