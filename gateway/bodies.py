"""Bodies that come as they are asked for: the rest of a request's, and an answer that a route makes bit by bit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from gateway.errors import ApiError
from pool.wire.http1 import RequestMessage

if TYPE_CHECKING:
    from gateway.connection import Connection


class RequestBody:
    """The rest of a request's body, as a BodySource. Raises ApiError 413 beyond the limit."""

    __slots__ = ("_connection", "_left", "_limit_bytes", "_message")

    def __init__(self, connection: Connection, message: RequestMessage, limit_bytes: int) -> None:
        self._connection = connection
        self._message = message
        self._limit_bytes = self._left = limit_bytes

    def limit(self, limit_bytes: int, begun_bytes: int) -> None:
        """Take no body larger than this, if that is less; `begun_bytes` of it came with the head."""
        self._limit_bytes = min(limit_bytes, self._limit_bytes)
        self._left = self._limit_bytes - begun_bytes

    async def receive(self) -> bytes:
        """See BodySource.receive."""
        data = await self._connection.read_more(self._message)
        self._left -= len(data)
        if self._left < 0:
            raise ApiError(413, "body_too_large", f"the body is larger than {self._limit_bytes} bytes")
        return data


class IteratedBody:
    """An async iterator as a BodySource."""

    __slots__ = ("_iterator",)

    def __init__(self, iterator: AsyncIterator[bytes]) -> None:
        self._iterator = iterator

    async def receive(self) -> bytes:
        async for data in self._iterator:
            if data:
                return data
        return b""
