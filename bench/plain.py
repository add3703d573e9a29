"""A plain start to compare with: create + start + first answer of what poold runs, by hand, without poold."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import docker
import docker.errors
import requests
import trio

from bench.asker import Asker, NoAnswer, Parsed
from bench.target import Target, request_bytes
from bench.workload import Workload
from pool.backends.base import Output, Running, StartRequest
from pool.backends.docker_container import LABEL_INSTANCE
from pool.backends.process import ProcessBackend
from pool.channel import Channel
from pool.contracts.registry import CONTRACTS
from pool.errors import ChannelClosed, PoolError
from pool.netns import can_enter
from pool.nschild import CLONE_NEWNET, setns
from pool.spec import FunctionSpec, Revision, make_revision

LABEL_BENCH = "io.poold.bench"
TIMEOUT_S = 120
POLL_S = 0.002
COPIED = ("Image", "Cmd", "Entrypoint", "Env", "User", "WorkingDir")


class PlainFailed(Exception):
    """The plain start did not come to an answer."""


class Plain(Protocol):
    """Something that can be started and asked by hand. All times are milliseconds; all raise PlainFailed."""

    def describe(self) -> str:
        """One line for people."""

    def sample(self) -> float:
        """Create + start + first answer; then it is ended."""

    def first(self, settle_s: float) -> float:
        """The first answer alone, of one that has been started, connected to, and left alone for so long."""

    def ask(self) -> float:
        """One answer of one that stays: the function's own time."""


def connect_when_it_listens(asker: Asker) -> None:
    """Raises PlainFailed."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return asker.connect()
        except OSError as exc:
            if time.monotonic() > deadline_s:
                raise PlainFailed(f"a plain start did not listen in {TIMEOUT_S:g} s: {exc}") from None
            time.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class InsideTarget(Target):
    """A port on the loopback interface of the network namespace that process `pid` is in."""

    pid: int = 0

    def open(self) -> socket.socket:
        """See Target. Entered by a thread of its own, as it could not be sure to come back."""
        found: list[socket.socket | OSError] = []
        thread = threading.Thread(target=self._enter, args=(found,))
        thread.start()
        thread.join()
        (result,) = found
        if isinstance(result, OSError):
            raise result
        result.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return result

    def _enter(self, found: list[socket.socket | OSError]) -> None:
        try:
            fd = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                setns(fd, CLONE_NEWNET)
            finally:
                os.close(fd)
            found.append(socket.socket(self.family, socket.SOCK_STREAM))
        except OSError as exc:
            found.append(exc)


class PlainContainer:
    """By the Docker engine: the very configuration of an instance's container, under another name. What `docker run`
    costs."""

    def __init__(self, work: Workload, port: int, instance_id: str) -> None:
        """Copies the container of a live instance. Raises PlainFailed."""
        self._work = work
        self._port = port
        self._mark = uuid.uuid4().hex[:12]
        self._standing: Asker | None = None
        self._stack = contextlib.ExitStack()  # ends what stands
        try:
            self._client = docker.DockerClient.from_env(timeout=TIMEOUT_S)
            found = self._client.containers.list(filters={"label": f"{LABEL_INSTANCE}={instance_id}"})
        except (docker.errors.DockerException, requests.RequestException) as exc:
            raise PlainFailed(f"the Docker engine does not answer the benchmark: {exc}") from None
        if not found:
            raise PlainFailed("poold's containers are not on the engine of DOCKER_HOST: it must be the same engine")
        self._api: Any = self._client.api  # some of its methods have no types
        shown = found[0].attrs
        self._config: dict[str, Any] = {key: shown["Config"][key] for key in COPIED}
        self._config["Labels"] = {LABEL_BENCH: self._mark}
        self._config["Healthcheck"] = {"Test": ["NONE"]}
        self._config["HostConfig"] = dict(shown["HostConfig"])
        self._network = str(shown["HostConfig"]["NetworkMode"])
        if self._network == "none" and not can_enter():
            self._network = self._config["HostConfig"]["NetworkMode"] = "bridge"

    def describe(self) -> str:
        """See Plain."""
        same = "same image, mounts and limits"
        return f"create + start + first answer through the Docker engine, {same}, network {self._network}"

    def sample(self) -> float:
        """See Plain."""
        began_s = time.perf_counter()
        with self._started() as asker:
            self._exchange(asker)
            return (time.perf_counter() - began_s) * 1000

    def first(self, settle_s: float) -> float:
        """See Plain."""
        with self._started() as asker:
            time.sleep(settle_s)
            return self._exchange(asker)

    def ask(self) -> float:
        """See Plain."""
        if self._standing is None:
            self._standing = self._stack.enter_context(self._started())
        return self._exchange(self._standing)

    @contextlib.contextmanager
    def _started(self) -> Iterator[Asker]:
        """A new container's connection; the container is removed at the end. What fails is removed by close()."""
        try:
            made = str(self._api.create_container_from_config(self._config)["Id"])
            self._api.start(made)
            asker = Asker(self._target(self._api.inspect_container(made)), TIMEOUT_S)
        except (docker.errors.DockerException, requests.RequestException) as exc:
            raise PlainFailed(f"a plain container did not start: {exc}") from None
        try:
            connect_when_it_listens(asker)
            yield asker
        finally:
            asker.close()
            with contextlib.suppress(docker.errors.DockerException, requests.RequestException):
                self._api.remove_container(made, force=True, v=True)

    def _exchange(self, asker: Asker) -> float:
        ask = self._work.ask
        try:
            return asker.ask(ask.method, ask.path, ask.body, ask.headers).latency_ms
        except NoAnswer as exc:
            raise PlainFailed(f"a plain container did not answer: {exc}") from None

    def _target(self, shown: dict[str, Any]) -> Target:
        if self._network == "none":
            place = ("127.0.0.1", self._port)
            return InsideTarget(socket.AF_INET, place, f"127.0.0.1:{self._port}", "/", pid=int(shown["State"]["Pid"]))
        address = str(next(iter(shown["NetworkSettings"]["Networks"].values()))["IPAddress"])
        return Target(socket.AF_INET, (address, self._port), f"{address}:{self._port}", "/")

    def close(self) -> None:
        """Remove what is left."""
        self._stack.close()
        with contextlib.suppress(docker.errors.DockerException, requests.RequestException):
            for container in self._client.containers.list(all=True, filters={"label": f"{LABEL_BENCH}={self._mark}"}):
                container.remove(force=True, v=True)
        self._client.close()


class PlainProcess:
    """By the process backend itself, without a pool: spawn in the same sandbox + first answer."""

    def __init__(self, work: Workload, port: int) -> None:
        self._work = work
        self._port = port
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._backend: ProcessBackend | None = None
        self._revision: Revision | None = None
        self._standing: Channel | None = None
        self._problems: list[PoolError] = []
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), name="plain-process")
        self._thread.start()
        self._ready.wait()
        for problem in self._problems:
            self._thread.join()
            raise PlainFailed(problem.message)

    async def _serve(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="poolbench-") as name:
                async with ProcessBackend(f"bench-{uuid.uuid4().hex[:8]}", Path(name)) as backend:
                    self._backend = backend
                    artifact = await backend.resolve(self._work.spec, str(self._work.code), lambda text: None)
                    self._revision = make_revision(self._work.spec, artifact)
                    self._token = trio.lowlevel.current_trio_token()
                    self._stop = trio.Event()
                    self._ready.set()
                    await self._stop.wait()
                    if self._standing is not None:
                        self._standing.close()
        except PoolError as exc:
            self._problems.append(exc)
        finally:
            self._ready.set()

    def describe(self) -> str:
        """See Plain."""
        return "spawn in the same sandbox + first answer, by the process backend without a pool"

    def sample(self) -> float:
        """See Plain."""
        return self._call(self._sample)

    def first(self, settle_s: float) -> float:
        """See Plain."""
        return self._call(lambda: self._first(settle_s))

    def ask(self) -> float:
        """See Plain."""
        return self._call(self._ask)

    def _call(self, step: Callable[[], Awaitable[float]]) -> float:
        try:
            return trio.from_thread.run(step, trio_token=self._token)
        except (PoolError, ChannelClosed) as exc:
            raise PlainFailed(f"a plain process did not answer: {exc}") from None

    async def _ask(self) -> float:
        if self._standing is None:
            _, self._standing = await self._start()  # the process ends with the backend
        return await self._exchange(self._standing)

    async def _first(self, settle_s: float) -> float:
        running, channel = await self._start()
        await trio.sleep(settle_s)
        latency_ms = await self._exchange(channel)
        channel.close()
        await running.stop(0.0)
        return latency_ms

    async def _sample(self) -> float:
        began_s = time.perf_counter()
        running, channel = await self._start()
        await self._exchange(channel)
        total_ms = (time.perf_counter() - began_s) * 1000
        channel.close()
        await running.stop(0.0)
        return total_ms

    async def _start(self) -> tuple[Running, Channel]:
        """A new process and the connection to it. What fails is ended with the backend."""
        spec, backend, revision = self._work.spec, self._backend, self._revision
        assert backend is not None
        assert revision is not None
        contract = CONTRACTS[spec.contract]
        instance_id = f"plain-{uuid.uuid4().hex[:8]}"
        request = StartRequest(
            instance_id=instance_id,
            revision=revision,
            env={**contract.environment(spec, instance_id, self._port), **spec.env},
            port=self._port,
            on_output=_unheard,
            code_target=contract.code_target,
        )
        running = await backend.start(request)
        deadline_s = trio.current_time() + TIMEOUT_S
        while True:
            try:
                return running, await running.dial(self._port)
            except ChannelClosed:
                if running.exited is not None or trio.current_time() > deadline_s:
                    raise
                await trio.sleep(POLL_S)

    async def _exchange(self, channel: Channel) -> float:
        """Milliseconds of one answer; only its length is looked at, as the connection is the function's alone."""
        ask = self._work.ask
        target = Target(socket.AF_INET, ("127.0.0.1", self._port), f"127.0.0.1:{self._port}", ask.path)
        request = request_bytes(target, ask.method, list(ask.headers), ask.body)
        parsed = Parsed()
        began = time.perf_counter_ns()
        await channel.send_all(request)
        while not parsed.answer.complete:
            data = await channel.receive()
            if not data:
                raise ChannelClosed("closed without a whole answer")
            parsed.parser.feed_data(data)
        return (time.perf_counter_ns() - began) / 1e6

    def close(self) -> None:
        """End the backend."""
        if self._token is not None and self._stop is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop.set)
        self._thread.join()


def _unheard(stream: Output, data: bytes) -> None:
    """What a plain one prints is nobody's."""


def port_of(spec: FunctionSpec) -> int:
    """Where its code listens."""
    return spec.port or CONTRACTS[spec.contract].default_port


@contextlib.contextmanager
def plain_start(work: Workload, backend: str, instance_id: str) -> Iterator[Plain]:
    """The plain start that belongs to a backend. `instance_id`: a live instance of the function. Raises PlainFailed."""
    plain: PlainContainer | PlainProcess
    if backend == "docker":
        plain = PlainContainer(work, port_of(work.spec), instance_id)
    elif backend == "process":
        plain = PlainProcess(work, port_of(work.spec))
    else:
        raise PlainFailed(f"there is no plain start to compare the backend {backend} with")
    try:
        yield plain
    finally:
        plain.close()
