"""A small synchronous client of the daemon's API, over its Unix socket or TCP. What poolctl and scripts use.

Only the standard library; its errors stand in client_errors.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterable, Iterator
from typing import IO, Any
from urllib.parse import quote, urlsplit

from gateway.client_errors import DEFAULT_HOST, BadHost, ClientError, RequestFailed, Unreachable, error_from

CHUNK_BYTES = 65_536
LINE_BYTES = 4 * 1024 * 1024  # a longer ndjson line is not the daemon's

Body = bytes | IO[bytes] | None


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Answer:
    """One answer whose head has come. Read it, iterate over it, or close it."""

    def __init__(self, client: Client, connection: http.client.HTTPConnection, raw: http.client.HTTPResponse) -> None:
        self._client = client
        self._connection = connection
        self._raw = raw
        self.status = raw.status
        self.reason = raw.reason
        self.headers = raw.getheaders()

    def header(self, name: str) -> str:
        """The first header of that name, "" when there is none."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), "")

    def chunks(self) -> Iterator[bytes]:
        """The body as it comes. Raises Unreachable when it is cut off."""
        try:
            while chunk := self._raw.read1(CHUNK_BYTES):
                yield chunk
            if self._raw.length:
                raise Unreachable(f"poold at {self._client.host} went away in the middle of an answer")
        except (OSError, http.client.HTTPException) as exc:
            raise self._client.lost(exc, answering=True) from exc
        finally:
            self.close()

    def read(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks())

    def json(self) -> Any:
        """The whole body as JSON. Raises ClientError when it is not."""
        body = self.read()
        try:
            return json.loads(body)
        except ValueError as exc:
            raise ClientError(
                f"the answer is not JSON: {body[:80]!r}", hint=f"is {self._client.host} a poold?"
            ) from exc

    def lines(self) -> Iterator[Any]:
        """The body's ndjson lines, each as soon as it is whole."""
        rest = b""
        for chunk in self.chunks():
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                if line.strip():
                    yield _parsed(line)
            if len(rest) > LINE_BYTES:
                raise ClientError(f"a line of the answer is longer than {LINE_BYTES} bytes")
        if rest.strip():
            yield _parsed(rest)

    def failure(self) -> RequestFailed:
        """The error in the body of an answer with an error status."""
        body = self.read()
        try:
            return error_from(self.status, json.loads(body))
        except ValueError:
            text = body[:200].decode("utf-8", "replace").strip()
            return RequestFailed(self.status, "http_error", f"HTTP {self.status} {self.reason}: {text}".rstrip(": "))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Client:
    """Calls to one daemon. Each call has a connection of its own; nothing is kept between them."""

    def __init__(self, host: str = DEFAULT_HOST, *, timeout_s: float | None = 600.0) -> None:
        """`host`: unix:///path or http://name:port. `timeout_s`: the longest silence. Raises BadHost."""
        self.host = host
        self._timeout_s = timeout_s
        parts = urlsplit(host)
        self._path = ""
        self._address = ("", 0)
        if parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
            self._path = parts.path
        elif parts.scheme in ("http", "tcp") and parts.hostname:
            try:
                self._address = (parts.hostname, parts.port or 80)
            except ValueError as exc:
                raise BadHost(f"{host!r}: {exc}") from exc
        elif host.startswith("/"):
            self._path, self.host = host, f"unix://{host}"
        else:
            raise BadHost(f"{host!r} is not an address of poold", hint=f"write {DEFAULT_HOST} or http://127.0.0.1:PORT")

    @property
    def is_local(self) -> bool:
        """It is spoken to over a Unix socket, so poold is on this host."""
        return bool(self._path)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Body = None,
        headers: Iterable[tuple[str, str]] = (),
        length: int | None = None,
        timeout_s: float | None = None,
        patient: bool = False,
    ) -> Answer:
        """Send one request and return when its answer's head is there, whatever its status.

        `body` may be a file: with `length` it is sent as it is, else chunked. `patient`: any silence is borne once
        the connection stands. Raises Unreachable.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if self._path:
            connection: http.client.HTTPConnection = _UnixConnection(self._path, timeout_s)
        else:
            connection = http.client.HTTPConnection(*self._address, timeout=timeout_s)
        try:
            connection.connect()
            if patient:
                connection.sock.settimeout(None)
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            raise self.lost(exc) from exc
        try:
            sent = dict(headers)
            if length is not None:
                sent["Content-Length"] = str(length)
            # A body refused before it was all sent breaks the pipe; the answer that is there says why.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body=body, headers=sent, encode_chunked=True)
            return Answer(self, connection, connection.getresponse())
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            raise self.lost(exc, answering=True) from exc
        except BaseException:
            connection.close()
            raise

    def call(self, method: str, path: str, *, body: Any = None, timeout_s: float | None = None) -> Any:
        """Send `body` as JSON, return the answer's JSON (None when empty). Raises RequestFailed, Unreachable."""
        raw = None if body is None else json.dumps(body).encode()
        headers = [("Content-Type", "application/json")] if raw is not None else []
        with self.request(method, path, body=raw, headers=headers, timeout_s=timeout_s) as answer:
            if answer.status >= 400:
                raise answer.failure()
            return None if answer.status == 204 else answer.json()

    def stream(self, method: str, path: str, *, body: Body = None, headers: Iterable[tuple[str, str]] = ()) -> Answer:
        """An answer to be read line by line; silence is no error. Raises RequestFailed, Unreachable."""
        headers = [("Accept", "application/x-ndjson"), *headers]
        answer = self.request(method, path, body=body, headers=headers, patient=True)
        if answer.status >= 400:
            raise answer.failure()
        return answer

    def lost(self, exc: Exception, *, answering: bool = False) -> Unreachable:
        """What an error of the connection means to a user."""
        if isinstance(exc, TimeoutError):
            return Unreachable(f"poold at {self.host} did not answer in time", hint="see `poolctl status` and its log")
        if answering:
            return Unreachable(
                f"poold at {self.host} closed the connection without a whole answer ({_why(exc)})",
                hint="see its log: journalctl -u poold",
            )
        if isinstance(exc, PermissionError):
            return Unreachable(
                f"you may not use {self.host}",
                hint="the socket belongs to the group poold: `sudo usermod -aG poold $USER`, then log in again",
            )
        return Unreachable(
            f"poold does not answer at {self.host}: is it running? ({_why(exc)})",
            hint="try `systemctl start poold`, or run `poold`; for another address use -H or POOLD_HOST",
        )


def function_path(name: str, action: str = "") -> str:
    """The path of a function's routes; the name is escaped."""
    return f"/v1/functions/{quote(name, safe='')}" + (f"/{action}" if action else "")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as exc:
        raise ClientError(f"a line of the answer is not JSON: {line[:80]!r}") from exc


def _why(exc: Exception) -> str:
    return (getattr(exc, "strerror", None) or str(exc) or type(exc).__name__).lower()
