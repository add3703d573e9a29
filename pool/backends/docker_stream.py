"""Answers of the engine that go on for long: output, events, pulls. Read in trio, without the SDK and its threads.

A thread blocked in a read cannot be cancelled, and one for each container would be many; here each is one socket
that trio waits for, and closing it ends the engine's side too. The request is HTTP/1.0, so that the answer's body
is what follows its head until the connection closes, with no chunks around it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlencode

import trio

from pool.backends.docker_client import EngineClient, unavailable
from pool.errors import BackendUnavailable

CONNECT_TIMEOUT_S = 10.0
HEAD_TIMEOUT_S = 30.0
MAX_HEAD_BYTES = 65_536
MAX_ERROR_BYTES = 65_536
MAX_LINE_BYTES = 4_194_304  # one event or progress line
RECEIVE_BYTES = 65_536
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 15, 5, 3  # a dead host is noticed within 30 s


class EngineRefused(Exception):
    """The engine answered a stream's request with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class EngineStream:
    """The body of one such answer."""

    def __init__(self, stream: trio.abc.Stream, begun: bytes) -> None:
        self._stream = stream
        self._begun = begun

    async def receive(self) -> bytes:
        """The next bytes; b"" at the end, whether the engine ended it or went away."""
        if self._begun:
            begun, self._begun = self._begun, b""
            await trio.lowlevel.checkpoint()
            return begun
        try:
            return bytes(await self._stream.receive_some(RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def documents(self) -> AsyncGenerator[dict[str, Any], None]:
        """The body as JSON documents, one a line. What is no JSON is skipped, an endless line ends it."""
        pending = bytearray()
        while data := await self.receive():
            pending += data
            *lines, rest = pending.split(b"\n")
            pending = rest
            for line in lines:
                with contextlib.suppress(ValueError):
                    document = json.loads(line)
                    if isinstance(document, dict):
                        yield document
            if len(pending) > MAX_LINE_BYTES:
                return

    async def aclose(self) -> None:
        """Close at once."""
        await trio.aclose_forcefully(self._stream)


async def open_stream(
    engine: EngineClient,
    method: str,
    path: str,
    query: dict[str, str],
    headers: dict[str, str] | None = None,
    head_timeout_s: float = HEAD_TIMEOUT_S,
) -> EngineStream:
    """Ask the engine and read the answer's head. Raises BackendUnavailable, EngineRefused. Close what it returns."""
    lines = [f"{method} /v{engine.version}{path}?{urlencode(query)} HTTP/1.0", "Host: docker"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if method == "POST":
        lines.append("Content-Length: 0")
    request = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            stream = await _connect(engine)
    except (OSError, trio.TooSlowError, trio.BrokenResourceError) as exc:
        raise unavailable(engine.endpoint, exc) from exc
    try:
        with trio.fail_after(head_timeout_s):
            await stream.send_all(request)
            status, rest = await _head(stream)
        if status >= 300:
            raise EngineRefused(status, await _error_text(stream, rest))
        return EngineStream(stream, rest)
    except (trio.BrokenResourceError, trio.TooSlowError) as exc:
        await trio.aclose_forcefully(stream)
        raise unavailable(engine.endpoint, exc) from exc
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _connect(engine: EngineClient) -> trio.abc.Stream:
    endpoint = engine.endpoint
    if endpoint.is_unix:
        return await trio.open_unix_socket(endpoint.socket_path)
    host, port = endpoint.address
    tcp = await trio.open_tcp_stream(host, port)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    if not endpoint.tls:
        return tcp
    try:
        context = await trio.to_thread.run_sync(endpoint.ssl_context)
        secured = trio.SSLStream(tcp, context, server_hostname=host, https_compatible=True)
        await secured.do_handshake()
    except ssl.SSLError as exc:
        await trio.aclose_forcefully(tcp)
        raise OSError(str(exc)) from exc
    except BaseException:
        await trio.aclose_forcefully(tcp)
        raise
    return secured


async def _head(stream: trio.abc.Stream) -> tuple[int, bytes]:
    """The answer's status, and what already came of its body."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = await stream.receive_some(RECEIVE_BYTES)
        received += data
        if not data or len(received) > MAX_HEAD_BYTES:
            raise BackendUnavailable("the engine closed the connection in the middle of its answer")
    head, rest = received.split(b"\r\n\r\n", 1)
    words = head.split(b"\r\n", 1)[0].split(b" ")
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise BackendUnavailable("what answers there is not a Docker engine", hint="check DOCKER_HOST")
    return int(words[1]), rest


async def _error_text(stream: trio.abc.Stream, text: bytes) -> str:
    with trio.move_on_after(HEAD_TIMEOUT_S):
        while len(text) < MAX_ERROR_BYTES and (data := await stream.receive_some(RECEIVE_BYTES)):
            text += data
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.decode(errors="replace").strip()
