"""One HTTP/1.1 connection into an instance: one exchange at a time, small ones in one write and one read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from pool.channel import Channel
from pool.contracts.base import BodySource
from pool.errors import BadAnswer, ChannelClosed, ExchangeError
from pool.upload import Upload
from pool.wire.http1 import BadMessage, Limits, ResponseReader

WHOLE_BYTES = 65_536  # an answer up to this size is read whole before it is passed on
SETTLE_S = 0.005  # code answers at the last byte of a body, before the body's source says that it was the last
IDLE_CHECK_S = 0.1  # a connection at rest longer than this is looked at before it is used

# An instance may send more than a client may, but not without end.
ANSWER_LIMITS = Limits(header_count=256, header_bytes=65_536)

T = TypeVar("T")


class NoAnswer(ExchangeError):
    """The connection closed before one byte of an answer, perhaps only because it had been at rest."""


class Http1Connection:
    """Not reusable after an error, a cancellation, or an answer that closes (see `reusable`)."""

    __slots__ = ("_channel", "_reader", "_upload", "last_used_s", "reusable")

    def __init__(self, channel: Channel, limits: Limits = ANSWER_LIMITS) -> None:
        self._channel = channel
        self._reader = ResponseReader(limits)
        self._upload: Upload | None = None
        self.reusable = True
        self.last_used_s = 0.0

    def gone(self) -> bool:
        """True when the peer closed it while it was at rest."""
        return self._channel.peer_gone()

    def close(self) -> None:
        self.reusable = False
        if self._upload is not None:
            self._upload.cancel()
        self._channel.close()

    async def exchange(
        self, head: bytes, stream: BodySource | None, *, chunked: bool = False, head_only: bool = False
    ) -> ResponseReader:
        """Send a request (`head` holds its body too unless `stream` has the rest) and read the answer.

        Returns the reader with status, headers and `parts`; when it is not yet `done`, the rest of the body comes
        from receive(), and what is left of the stream goes on being sent meanwhile. An answer that is complete
        before the stream stands: the rest of the stream is of no more use to anybody.

        Raises ExchangeError, BadAnswer, and what the stream raises. Anything but a normal return leaves it not
        reusable and the stream unused.
        """
        reader = self._reader
        reader.begin(head_only=head_only)
        self.reusable = False
        if stream is not None:
            await self._exchange_streaming(head, stream, chunked)
            return reader
        try:
            sent = self._channel.try_send(head)
            if sent != len(head):
                await self._channel.send_all(memoryview(head)[sent:])
        except ChannelClosed as exc:
            # An instance may answer (413, say) and close without reading all; the answer may be there.
            await self._read_head(f"it closed the connection while the request was sent ({exc})")
        else:
            await self._read_head("")
        if not reader.done:
            await self._read_short_body()
        if reader.done:
            self.reusable = reader.keep_alive
        return reader

    async def receive(self) -> bytes:
        """The next bytes of an answer that exchange() did not read whole; b"" at its end.

        Raises as exchange() does. Cancelling loses nothing.
        """
        reader = self._reader
        data = reader.take_body()
        while not data and not reader.done:
            if self._upload is None:
                await self._feed()
            else:
                await self._while_sending(self._upload, self._feed)
            data = reader.take_body()
        if not data:
            self.reusable = reader.keep_alive
            if self._upload is not None:
                await self._end_upload(self._upload)
        return data

    async def _read_head(self, problem: str) -> None:
        reader = self._reader
        none_came = True
        while not reader.head_done:
            data = b""
            try:
                data = await self._channel.receive()
                if data:
                    none_came = False
                    reader.feed(data)
                    if not reader.head_done:
                        self._channel.hurry()
                else:
                    reader.end_of_stream()
            except ChannelClosed as exc:
                kind = NoAnswer if none_came else ExchangeError
                raise kind(problem or f"it reset the connection before it answered ({exc})", sent=True) from exc
            except BadMessage as exc:
                if data:
                    raise BadAnswer(f"the instance sent something that is {exc.message}", sent=True) from exc
                kind = NoAnswer if none_came else ExchangeError
                raise kind(problem or "it closed the connection before it answered", sent=True) from exc

    async def _read_short_body(self) -> None:
        reader = self._reader
        if reader.headers_say_short():
            size = sum(map(len, reader.parts))
            while not reader.done and size <= WHOLE_BYTES:
                size += await self._feed()

    async def _feed(self) -> int:
        """Read once more of the body. Returns how many bytes came."""
        reader = self._reader
        data = b""
        self._channel.hurry()
        try:
            data = await self._channel.receive()
            if data:
                reader.feed(data)
            else:
                reader.end_of_stream()
        except ChannelClosed as exc:
            raise ExchangeError("it reset the connection in the middle of its answer", sent=True) from exc
        except BadMessage as exc:
            if data:
                raise BadAnswer(f"the instance sent something that is {exc.message}", sent=True) from exc
            raise ExchangeError("it closed the connection in the middle of its answer", sent=True) from exc
        return len(data)

    # --- with a body that is still being sent ---

    async def _exchange_streaming(self, head: bytes, stream: BodySource, chunked: bool) -> None:
        upload = self._upload = Upload(self._channel, head, stream, chunked=chunked)
        upload.start()
        answered = False
        try:
            await self._while_sending(upload, self._answer_to_upload)
            answered = True
        finally:
            if not answered:
                await upload.stop()
        if self._reader.done:
            self.reusable = self._reader.keep_alive
            await self._end_upload(upload)

    async def _answer_to_upload(self) -> None:
        await self._read_head("")
        if not self._reader.done:
            await self._read_short_body()

    async def _while_sending(self, upload: Upload, read: Callable[[], Awaitable[T]]) -> T:
        """Read, unless the body turns out to be impossible to complete: raises what its source raised."""
        with trio.CancelScope() as scope:
            upload.on_source_failure(scope.cancel)
            if upload.source_failed():
                scope.cancel()
            try:
                return await read()
            except ExchangeError as exc:
                await upload.stop()
                if isinstance(upload.failure, ChannelClosed) and not isinstance(exc, BadAnswer):
                    why = f"it closed the connection while the request was sent ({upload.failure})"
                    raise ExchangeError(why, sent=True) from exc
                raise
            finally:
                upload.on_source_failure(None)
        assert upload.failure is not None
        raise upload.failure

    async def _end_upload(self, upload: Upload) -> None:
        self._upload = None
        await upload.settle(SETTLE_S)
        self.reusable = self.reusable and upload.complete
        await upload.stop()
