"""What a container prints, from Docker's attach stream: one socket for each container, read in trio.

The stream is frames: one byte saying which output, three unused, four of length (big-endian), then the bytes
(Docker Engine API, "Attach to a container", stream format).
"""

from __future__ import annotations

import contextlib

from pool.backends.base import OnOutput, Output
from pool.backends.docker_client import EngineClient
from pool.backends.docker_stream import EngineStream, open_stream

HEADER_BYTES = 8


class Demultiplexer:
    """Frames in any pieces to outputs. Pure: feed() it bytes; it keeps no more than a header."""

    __slots__ = ("_header", "_left", "_on_output", "_output")

    def __init__(self, on_output: OnOutput) -> None:
        self._on_output = on_output
        self._header = b""
        self._output = Output.STDOUT
        self._left = 0  # bytes of the present frame that have not come yet

    def feed(self, data: bytes) -> None:
        """Pass on what `data` holds; a frame's bytes go out as they come."""
        at = 0
        while at < len(data):
            if self._left == 0:
                missing = HEADER_BYTES - len(self._header)
                self._header += data[at : at + missing]
                at += missing
                if len(self._header) < HEADER_BYTES:
                    return
                self._output = Output.STDERR if self._header[0] == Output.STDERR else Output.STDOUT
                self._left = int.from_bytes(self._header[4:8], "big")
                self._header = b""
                continue
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            self._on_output(self._output, piece)


async def attach(engine: EngineClient, container_id: str) -> EngineStream:
    """The stream of what the container prints from now on. Raises BackendUnavailable, EngineRefused."""
    query = {"stream": "1", "stdout": "1", "stderr": "1"}
    return await open_stream(engine, "POST", f"/containers/{container_id}/attach", query)


async def pump(stream: EngineStream, on_output: OnOutput) -> None:
    """Read the stream to its end (the container's, or the engine's) and close it."""
    parts = Demultiplexer(on_output)
    async with contextlib.aclosing(stream):
        while data := await stream.receive():
            parts.feed(data)
