"""The way to a Docker engine: where it is, its certificates, and calls to it through the SDK in threads.

Clients are not safe to share between threads, so each call takes one from a stack and gives it back: a client is
only ever in one thread, its kept-alive connection is used again, and no more exist than calls ran at once. Clients
made with certificates that have been replaced since are dropped.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import docker.errors
import outcome
import requests
import requests.adapters
import trio
import urllib3.exceptions
from docker import APIClient
from docker.tls import TLSConfig

from pool.errors import BackendUnavailable

T = TypeVar("T")

DEFAULT_HOST = "unix:///var/run/docker.sock"
OLDEST_API = (1, 41)  # Docker 20.10
NEWEST_API = (1, 47)  # what is used here is unchanged up to it
CALL_TIMEOUT_S = 60.0  # create and start on a machine under load
SETTLE_S = 10.0  # how long a cancelled call that changes something may take to come back
CALLS = 16  # of the engine's time-consuming calls at once; it serialises most of them anyway
QUERIES = 4  # short calls have threads of their own: an exit is reported while sixteen starts run


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the engine is, by Docker's own conventions."""

    host: str
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    tls: bool = False
    verify: bool = True

    @classmethod
    def find(
        cls,
        docker_host: str | None = None,
        cert_path: str | Path | None = None,
        tls_verify: bool | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> Endpoint:
        """What was given, else DOCKER_HOST, DOCKER_CERT_PATH (ca.pem, cert.pem, key.pem) and DOCKER_TLS_VERIFY.

        As with the docker command, TLS is used when either of the last two is set, and the engine's certificate
        is checked when DOCKER_TLS_VERIFY is. Raises BackendUnavailable for a host of an unknown kind.
        """
        host = docker_host or environ.get("DOCKER_HOST") or DEFAULT_HOST
        kind, _, rest = host.partition("://")
        if kind not in ("unix", "tcp", "http", "https") or not rest or not _port_is_fine(kind, host):
            raise BackendUnavailable(
                f"poold cannot reach an engine at {host!r}",
                hint="use unix:///path/docker.sock, or tcp://host:2376 with TLS certificates; "
                "for an engine behind SSH, forward its socket: ssh -L /run/engine.sock:/var/run/docker.sock HOST",
            )
        where = str(cert_path or environ.get("DOCKER_CERT_PATH") or "")
        verify = tls_verify if tls_verify is not None else bool(environ.get("DOCKER_TLS_VERIFY"))
        if kind == "unix" or not (where or verify or kind == "https"):
            return cls(host)
        folder = Path(where) if where else Path.home() / ".docker"
        return cls(host, folder / "ca.pem", folder / "cert.pem", folder / "key.pem", tls=True, verify=verify)

    @property
    def is_unix(self) -> bool:
        return self.host.startswith("unix://")

    @property
    def socket_path(self) -> str:
        """For a Unix socket: where it is."""
        return self.host.removeprefix("unix://")

    @property
    def address(self) -> tuple[str, int]:
        """For TCP: the host and the port (2376 with TLS and 2375 without, when the host names none)."""
        parts = urlsplit(self.host)
        return parts.hostname or "localhost", parts.port or (2376 if self.tls else 2375)

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes when a certificate file does."""
        found = []
        for path in (self.ca, self.cert, self.key):
            try:
                info = path.stat() if path else None
            except OSError:
                info = None
            found.append((info.st_mtime_ns, info.st_ino, info.st_size) if info else (0, 0, 0))
        return tuple(found)

    def ssl_context(self) -> ssl.SSLContext:
        """For streams that are read without the SDK; reads the files now. Raises OSError, ssl.SSLError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.verify
        context.verify_mode = ssl.CERT_REQUIRED if self.verify else ssl.CERT_NONE
        if self.verify:
            context.load_verify_locations(self.ca)
        if self.cert and self.key and self.cert.exists():
            context.load_cert_chain(self.cert, self.key)
        return context

    def knock(self, timeout_s: float) -> None:
        """Raise OSError when no engine listens on its Unix socket. 50 µs: the SDK says it less clearly, and leaves
        an open socket behind when it cannot connect."""
        if self.is_unix:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(timeout_s)
                sock.connect(self.socket_path)

    def make_client(self, version: str, timeout_s: float) -> APIClient:
        """A client of the SDK. Raises what the SDK raises."""
        tls: TLSConfig | bool = False
        if self.tls:
            pair = (str(self.cert), str(self.key)) if self.cert and self.cert.exists() else None
            tls = TLSConfig(client_cert=pair, ca_cert=str(self.ca), verify=self.verify)
        url = self.host if self.is_unix else "tcp://{}:{}".format(*self.address)
        client = APIClient(base_url=url, version=version, timeout=int(timeout_s), tls=tls)
        client.trust_env = False  # the engine is never behind the web's proxy, nor signed by another CA
        if not self.is_unix:
            client.mount("http://", requests.adapters.HTTPAdapter(max_retries=0))
            client.mount("https://", requests.adapters.HTTPAdapter(max_retries=0))
        return client


class EngineClient:
    """Calls to one engine. `await call(fn)` runs fn(client) in a thread."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.version = "1.41"
        self._idle: list[APIClient] = []
        self._stamp = endpoint.stamp()
        self._calls = trio.CapacityLimiter(CALLS)
        self._queries = trio.CapacityLimiter(QUERIES)
        self._closed = False

    async def negotiate(self) -> dict[str, str]:
        """Agree on the API version; what the engine says of itself. Raises BackendUnavailable."""
        try:
            answer = await self.query(lambda client: client.version(api_version=False))
        except docker.errors.APIError as exc:
            raise unavailable(self.endpoint, OSError(str(exc.explanation or exc))) from exc
        theirs = _version(str(answer.get("ApiVersion", "0")))
        if theirs < OLDEST_API:
            raise BackendUnavailable(
                f"the Docker engine at {self.endpoint.host} is version {answer.get('Version')}: too old",
                hint="poold needs Docker 20.10 (API 1.41) or newer",
            )
        self.version = "{}.{}".format(*min(theirs, NEWEST_API))
        self._drop_idle()
        return {str(key): str(value) for key, value in answer.items()}

    async def call(self, fn: Callable[[APIClient], T], *, timeout_s: float = CALL_TIMEOUT_S) -> T:
        """For what changes something. A thread cannot be stopped: when cancelled, this waits up to SETTLE_S for
        the call to come back, so that the caller's clean-up comes after it; what takes longer, recovery removes.

        Raises BackendUnavailable when the engine does not answer, docker.errors.APIError for its refusals.
        """
        borrower = object()
        await self._calls.acquire_on_behalf_of(borrower)
        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        results: list[outcome.Outcome[T]] = []

        def finish() -> None:
            self._calls.release_on_behalf_of(borrower)
            done.set()

        def deliver(result: outcome.Outcome[T]) -> None:
            results.append(result)
            with contextlib.suppress(trio.RunFinishedError):  # then nobody waits any more
                token.run_sync_soon(finish)

        trio.lowlevel.start_thread_soon(lambda: self._run(fn, timeout_s), deliver)
        try:
            await done.wait()
        except trio.Cancelled:
            with trio.move_on_after(SETTLE_S, shield=True):
                await done.wait()
            raise
        return results[0].unwrap()

    async def query(self, fn: Callable[[APIClient], T], *, timeout_s: float = 15.0) -> T:
        """For short calls that change nothing, or nothing that matters: abandoned at once when cancelled."""
        return await trio.to_thread.run_sync(
            lambda: self._run(fn, timeout_s), abandon_on_cancel=True, limiter=self._queries
        )

    def close(self) -> None:
        """Close the connections at rest; those in use close when their call ends."""
        self._closed = True
        self._drop_idle()

    def _run(self, fn: Callable[[APIClient], T], timeout_s: float) -> T:
        """In a thread."""
        stamp = self.endpoint.stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            self._drop_idle()
        try:
            self.endpoint.knock(timeout_s)
            try:
                client = self._idle.pop()
            except IndexError:
                client = self.endpoint.make_client(self.version, timeout_s)
            client.timeout = int(timeout_s)
            try:
                result = fn(client)
            except BaseException as exc:
                if isinstance(exc, docker.errors.APIError) and not self._closed:
                    self._give_back(client, stamp)
                else:
                    client.close()
                raise
            self._give_back(client, stamp)
            return result
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as exc:
            if isinstance(exc, docker.errors.APIError):
                raise
            raise unavailable(self.endpoint, exc) from exc
        except docker.errors.APIError:
            raise
        except docker.errors.DockerException as exc:
            raise unavailable(self.endpoint, exc) from exc

    def _give_back(self, client: APIClient, stamp: object) -> None:
        if self._closed or stamp != self._stamp:
            client.close()
        else:
            self._idle.append(client)

    def _drop_idle(self) -> None:
        while self._idle:
            try:
                self._idle.pop().close()
            except IndexError:
                return


def _port_is_fine(kind: str, host: str) -> bool:
    try:
        return kind == "unix" or urlsplit(host).port != 0
    except ValueError:
        return False


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def unavailable(endpoint: Endpoint, exc: BaseException) -> BackendUnavailable:
    """Why the engine could not be asked, and what to do about it."""
    text = _innermost(exc)
    reason, hint = text, "start the engine (systemctl start docker)"
    if "No such file" in text and endpoint.is_unix:
        reason = "there is no such socket"
    elif "Permission denied" in text and endpoint.is_unix:
        reason = "permission denied"
        hint = "add poold's user to the group that owns the socket (usermod -aG docker USER), or run poold as root"
    elif "refused" in text:
        reason = "connection refused: nothing listens there"
    elif "timed out" in text.lower() or isinstance(exc, requests.Timeout):
        reason = "it did not answer in time"
        hint = "see whether the engine is well: docker ps"
    elif endpoint.tls or "certificate" in text.lower() or "HTTPS server" in text:
        reason = f"TLS failed: {text}"
        hint = (
            "DOCKER_CERT_PATH must hold ca.pem, cert.pem and key.pem that the engine accepts"
            if endpoint.tls
            else "the engine wants TLS: set DOCKER_CERT_PATH and DOCKER_TLS_VERIFY=1"
        )
    choice = 'set DOCKER_HOST to an engine that runs, or use backend = "process"'
    return BackendUnavailable(
        f"the Docker engine at {endpoint.host} cannot be reached: {reason}", hint=f"{hint}; or {choice}"
    )


def _innermost(exc: BaseException) -> str:
    """The text of the first cause: the outer ones only say that something failed."""
    seen: BaseException = exc
    while True:
        inner = seen.__cause__ or seen.__context__
        if inner is None and seen.args and isinstance(seen.args[0], BaseException):
            inner = seen.args[0]
        if inner is None or isinstance(inner, BaseExceptionGroup):
            return str(seen) or type(seen).__name__
        seen = inner
