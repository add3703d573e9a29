"""One HTTP/1.1 connection into an instance: one exchange at a time, small ones in one write and one read."""

from __future__ import annotations

import trio

from pool.channel import Channel
from pool.contracts.base import BodySource, Headers
from pool.errors import BadAnswer, ChannelClosed, ExchangeError
from pool.wire.http1 import BadMessage, Limits, ResponseReader, chunk

WHOLE_BYTES = 65_536  # an answer up to this size is read whole before it is passed on
IDLE_CHECK_S = 0.005  # a connection at rest longer than this is looked at before it is used

# An instance may send more than a client may, but not without end.
ANSWER_LIMITS = Limits(header_count=256, header_bytes=65_536)


class Http1Connection:
    """Not reusable after an error, a cancellation, or an answer that closes (see `reusable`)."""

    __slots__ = ("_channel", "_reader", "last_used_s", "reusable")

    def __init__(self, channel: Channel, limits: Limits = ANSWER_LIMITS) -> None:
        self._channel = channel
        self._reader = ResponseReader(limits)
        self.reusable = True
        self.last_used_s = 0.0

    def gone(self) -> bool:
        """True when the peer closed it while it was at rest."""
        return self._channel.peer_gone()

    def close(self) -> None:
        self.reusable = False
        self._channel.close()

    async def exchange(
        self, head: bytes, stream: BodySource | None, *, chunked: bool = False, head_only: bool = False
    ) -> ResponseReader:
        """Send a request (`head` holds its body too unless `stream` has the rest) and read the answer.

        Returns the reader with status, headers and `parts`; when it is not yet `done`, the rest of the body comes
        from receive(). Raises ExchangeError, BadAnswer. Anything but a normal return leaves it not reusable.
        """
        reader = self._reader
        reader.begin(head_only=head_only)
        self.reusable = False
        if stream is None:
            try:
                await self._channel.send_all(head)
            except ChannelClosed as exc:
                # An instance may answer (413, say) and close without reading all; the answer may be there.
                await self._read_head(f"it closed the connection while the request was sent ({exc})")
            else:
                await self._read_head("")
        else:
            await self._exchange_streaming(head, stream, chunked)
        size = sum(map(len, reader.parts))
        while not reader.done and size <= WHOLE_BYTES and reader.headers_say_short():
            size += await self._feed()
        if reader.done:
            self.reusable = reader.keep_alive
        return reader

    async def receive(self) -> bytes:
        """The next bytes of an answer that exchange() did not read whole; b"" at its end."""
        reader = self._reader
        data = reader.take_body()
        while not data and not reader.done:
            await self._feed()
            data = reader.take_body()
        if not data:
            self.reusable = reader.keep_alive
        return data

    async def _read_head(self, problem: str) -> None:
        reader = self._reader
        while not reader.head_done:
            try:
                data = await self._channel.receive()
                if data:
                    reader.feed(data)
                else:
                    reader.end_of_stream()
            except ChannelClosed as exc:
                raise ExchangeError(
                    problem or f"it reset the connection before it answered ({exc})", sent=True
                ) from exc
            except BadMessage as exc:
                if data:
                    raise BadAnswer(f"the instance sent something that is {exc.message}", sent=True) from exc
                raise ExchangeError(problem or "it closed the connection before it answered", sent=True) from exc

    async def _feed(self) -> int:
        """Read once more of the body. Returns how many bytes came."""
        reader = self._reader
        try:
            data = await self._channel.receive()
            if data:
                reader.feed(data)
            else:
                reader.end_of_stream()
        except ChannelClosed as exc:
            raise ExchangeError("it reset the connection in the middle of its answer", sent=True) from exc
        except BadMessage as exc:
            raise BadAnswer(f"the instance's answer: {exc.message}", sent=True) from exc
        return len(data)

    async def _exchange_streaming(self, head: bytes, stream: BodySource, chunked: bool) -> None:
        """Send a long body while listening for the answer, which may come before the body's end."""
        problem = ""
        source_failed: Exception | None = None
        sent = False

        async def send() -> None:
            nonlocal problem, source_failed, sent
            try:
                await self._channel.send_all(head)
                while True:
                    try:
                        data = await stream.receive()
                    except Exception as exc:  # noqa: BLE001 - whatever the source raises is raised again
                        source_failed = exc  # raised below, outside the nursery, as itself
                        nursery.cancel_scope.cancel()
                        return
                    if not data:
                        break
                    await self._channel.send_all(chunk(data) if chunked else data)
                if chunked:
                    await self._channel.send_all(chunk(b""))
                sent = True
            except ChannelClosed as exc:
                problem = f"it closed the connection while the request was sent ({exc})"

        failure: ExchangeError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            try:
                await self._read_head("")
            except ExchangeError as exc:
                failure = exc
            # An answer before the body's end stands: the rest of the body is of no more use to anybody.
            nursery.cancel_scope.cancel()
        if source_failed is not None:
            raise source_failed
        if failure is not None:
            raise ExchangeError(problem, sent=True) if problem else failure
        if not sent:
            self._reader.keep_alive = False


def join_headers(headers: Headers) -> bytes:
    """Header lines, each with its newline."""
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])
