"""The sending half of a long exchange: it goes on while the answer is already being read."""

from __future__ import annotations

from collections.abc import Callable

import trio

from pool.channel import Channel
from pool.contracts.base import BodySource
from pool.errors import ChannelClosed
from pool.wire.http1 import chunk


class Upload:
    """Sends a request's head and then its body as it comes, in a task of its own.

    Code that echoes an upload begins to answer before it has read all, so sending outlives the call that began it:
    the task is trio's (a system task), and its owner ends it with stop() or cancel(). It raises nothing.
    """

    __slots__ = ("_channel", "_chunked", "_ended", "_head", "_on_failure", "_scope", "_source", "complete", "failure")

    def __init__(self, channel: Channel, head: bytes, source: BodySource, *, chunked: bool) -> None:
        self._channel = channel
        self._head = head
        self._source = source
        self._chunked = chunked
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._on_failure: Callable[[], None] | None = None
        self.complete = False  # all of it was sent
        self.failure: Exception | None = None  # ChannelClosed, or what the source raised

    def start(self) -> None:
        """Begin to send."""
        trio.lowlevel.spawn_system_task(self._run)

    def source_failed(self) -> bool:
        """True when the body cannot be completed, so that the answer is of no use."""
        return self.failure is not None and not isinstance(self.failure, ChannelClosed)

    def on_source_failure(self, call: Callable[[], None] | None) -> None:
        """Whom to wake when the body cannot be completed."""
        self._on_failure = call

    def cancel(self) -> None:
        """Send no more."""
        self._scope.cancel()

    async def settle(self, limit_s: float) -> None:
        """Wait for the end of the sending, but not long."""
        if not self._ended.is_set():
            with trio.move_on_after(limit_s):
                await self._ended.wait()

    async def stop(self) -> None:
        """Send no more; returns when the source is no longer in use. Not cut short by a cancellation."""
        self._scope.cancel()
        if not self._ended.is_set():
            with trio.CancelScope(shield=True):
                await self._ended.wait()

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._send()
        except Exception as exc:  # noqa: BLE001 - the reader of the answer raises it again
            self.failure = exc
            if self._on_failure is not None and self.source_failed():
                self._on_failure()
        finally:
            self._ended.set()

    async def _send(self) -> None:
        send_all, receive = self._channel.send_all, self._source.receive
        await send_all(self._head)
        while data := await receive():
            await send_all(chunk(data) if self._chunked else data)
        if self._chunked:
            await send_all(chunk(b""))
        self.complete = True
