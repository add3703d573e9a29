"""A plain start to compare with: create + start + first answer of what poold runs, by hand, without poold."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from pool.spec import FunctionSpec, make_revision

LABEL_BENCH = "io.poold.bench"
TIMEOUT_S = 120
POLL_S = 0.002
AGAIN = 10  # further questions to the plain one, for the function's own time
PAUSE_S = 0.005  # before each: what is compared comes after a pause too, with caches as cold
COPIED = ("Image", "Cmd", "Entrypoint", "Env", "User", "WorkingDir")


class PlainFailed(Exception):
    """The plain start did not come to an answer."""


@dataclass(slots=True)
class PlainSample:
    """One plain start, in milliseconds."""

    total_ms: float  # from the decision to create to the end of the first answer
    first_ms: float  # the first answer alone, over a connection that stood
    again_ms: list[float] = field(default_factory=list)  # further answers


class Plain(Protocol):
    """Something that can be started and asked by hand."""

    def describe(self) -> str:
        """One line for people."""

    def sample(self) -> PlainSample:
        """Start one, ask it, end it. Raises PlainFailed."""


def ask_until_it_listens(target: Target, work: Workload, began_s: float) -> PlainSample:
    """From `began_s` on the performance counter to the first answer and some more. Raises PlainFailed."""
    asker = Asker(target, TIMEOUT_S)
    ask = work.ask
    try:
        while True:
            try:
                asker.connect()
                first = asker.ask(ask.method, ask.path, ask.body, ask.headers)
                break
            except (OSError, NoAnswer) as exc:
                if time.perf_counter() - began_s > TIMEOUT_S:
                    raise PlainFailed(f"a plain start did not answer in {TIMEOUT_S:g} s: {exc}") from None
                time.sleep(POLL_S)
        total_ms = (time.perf_counter() - began_s) * 1000
        again = []
        for _ in range(AGAIN):
            time.sleep(PAUSE_S)
            again.append(asker.ask(ask.method, ask.path, ask.body, ask.headers).latency_ms)
        return PlainSample(total_ms, first.latency_ms, again)
    except NoAnswer as exc:
        raise PlainFailed(f"a plain start answered once and then not: {exc}") from None
    finally:
        asker.close()


class PlainContainer:
    """By the Docker engine: the very configuration of an instance's container, under another name, on the engine's
    default bridge, by which it can be asked. What `docker run` costs."""

    def __init__(self, work: Workload, port: int, instance_id: str) -> None:
        """Copies the container of a live instance. Raises PlainFailed."""
        self._work = work
        self._port = port
        self._mark = uuid.uuid4().hex[:12]
        try:
            self._client = docker.DockerClient.from_env(timeout=TIMEOUT_S)
            found = self._client.containers.list(filters={"label": f"{LABEL_INSTANCE}={instance_id}"})
        except (docker.errors.DockerException, requests.RequestException) as exc:
            raise PlainFailed(f"the Docker engine does not answer the benchmark: {exc}") from None
        if not found:
            raise PlainFailed("poold's containers are not on the engine of DOCKER_HOST: it must be the same engine")
        shown = found[0].attrs
        self._config: dict[str, Any] = {key: shown["Config"][key] for key in COPIED}
        self._config["Labels"] = {LABEL_BENCH: self._mark}
        self._config["Healthcheck"] = {"Test": ["NONE"]}
        self._config["HostConfig"] = {**shown["HostConfig"], "NetworkMode": "bridge"}

    def describe(self) -> str:
        """See Plain."""
        return "create + start + first answer through the Docker engine, same image, mounts and limits, on its bridge"

    def sample(self) -> PlainSample:
        """See Plain."""
        api: Any = self._client.api  # some of its methods have no types
        made = ""
        try:
            began_s = time.perf_counter()
            made = str(api.create_container_from_config(self._config)["Id"])
            api.start(made)
            networks = api.inspect_container(made)["NetworkSettings"]["Networks"]
            address = str(next(iter(networks.values()))["IPAddress"])
            target = Target(socket.AF_INET, (address, self._port), f"{address}:{self._port}", "/")
            return ask_until_it_listens(target, self._work, began_s)
        except (docker.errors.DockerException, requests.RequestException) as exc:
            raise PlainFailed(f"a plain container did not start: {exc}") from None
        finally:
            if made:
                with contextlib.suppress(docker.errors.DockerException):
                    api.remove_container(made, force=True, v=True)

    def close(self) -> None:
        """Remove what may be left."""
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
                    self._token = trio.lowlevel.current_trio_token()
                    self._stop = trio.Event()
                    self._ready.set()
                    await self._stop.wait()
        except PoolError as exc:
            self._problems.append(exc)
        finally:
            self._ready.set()

    def describe(self) -> str:
        """See Plain."""
        return "spawn in the same sandbox + first answer, by the process backend without a pool"

    def sample(self) -> PlainSample:
        """See Plain."""
        try:
            return trio.from_thread.run(self._sample, trio_token=self._token)
        except (PoolError, ChannelClosed) as exc:
            raise PlainFailed(f"a plain process did not answer: {exc}") from None

    async def _sample(self) -> PlainSample:
        spec, backend = self._work.spec, self._backend
        assert backend is not None
        artifact = await backend.resolve(spec, str(self._work.code), lambda text: None)
        revision = make_revision(spec, artifact)
        contract = CONTRACTS[spec.contract]
        instance_id = f"plain-{uuid.uuid4().hex[:8]}"
        env = {**contract.environment(spec, instance_id, self._port), **spec.env}
        request = StartRequest(
            instance_id=instance_id,
            revision=revision,
            env=env,
            port=self._port,
            on_output=_unheard,
            code_target=contract.code_target,
        )
        began_s = time.perf_counter()
        running = await backend.start(request)
        try:
            channel = await self._dial(running, began_s)
            try:
                first_ms = await self._exchange(channel)
                total_ms = (time.perf_counter() - began_s) * 1000
                again = []
                for _ in range(AGAIN):
                    await trio.sleep(PAUSE_S)
                    again.append(await self._exchange(channel))
                return PlainSample(total_ms, first_ms, again)
            finally:
                channel.close()
        finally:
            with trio.CancelScope(shield=True):
                await running.stop(0.0)

    async def _dial(self, running: Running, began_s: float) -> Channel:
        while True:
            try:
                return await running.dial(self._port)
            except ChannelClosed:
                if running.exited is not None or time.perf_counter() - began_s > TIMEOUT_S:
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
