"""What the tests of the docker backend share: an engine, an image, and a look at what is left."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from docker import APIClient

from pool.backends.base import BackendEvent, InstanceExited, Output, Running, StartRequest
from pool.backends.docker import DockerBackend
from pool.backends.docker_container import LABEL_DAEMON
from pool.backends.docker_running import DockerInstance
from pool.errors import ChannelClosed
from pool.spec import FunctionSpec, PoolSpec, Revision, make_revision

PORT = 9000
ANSWERING = "/busybox httpd -f -p 9000"  # to everything: 404


def client_of(url: str) -> APIClient:
    return APIClient(base_url=url, version="1.41", timeout=60)


def busybox_tar(**files: str) -> bytes:
    """A root file system of busybox alone, and `files` in /."""
    buffer = io.BytesIO()
    busybox = shutil.which("busybox")
    assert busybox is not None
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(os.path.realpath(busybox), arcname="busybox")
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def build_image(url: str, name: str, dockerfile: str) -> None:
    """Make an image of a Dockerfile that needs no file."""
    with contextlib.closing(client_of(url)) as client:
        lines = list(
            client.build(fileobj=io.BytesIO(dockerfile.encode()), tag=name, decode=True, rm=True, forcerm=True)
        )
        assert "error" not in lines[-1], lines[-1]


def import_image(url: str, name: str, data: bytes, changes: list[str]) -> str:
    """Make an image of a root file system; its id."""
    client: Any = client_of(url)
    repository, _, tag = name.partition(":")
    answer = client.import_image_from_data(data, repository=repository, tag=tag or "latest", changes=changes)
    client.close()
    return str(json.loads(answer.strip().splitlines()[-1])["status"])


class Printed:
    """Collects an instance's output, and waits for some of it."""

    def __init__(self) -> None:
        self.by_stream = {Output.STDOUT: b"", Output.STDERR: b""}
        self._more = trio.Event()

    def __call__(self, output: Output, data: bytes) -> None:
        self.by_stream[output] += data
        self._more.set()
        self._more = trio.Event()

    @property
    def out(self) -> str:
        return self.by_stream[Output.STDOUT].decode()

    @property
    def err(self) -> str:
        return self.by_stream[Output.STDERR].decode()

    async def wait_for(self, text: str) -> str:
        """Until it was printed; all that was."""
        with trio.fail_after(30):
            while text not in self.out:
                await self._more.wait()
        return self.out


class Kit:
    """One backend under test, and shorthands."""

    def __init__(self, backend: DockerBackend, url: str, image: str) -> None:
        self.backend = backend
        self.url = url
        self.image = image
        self.printed = Printed()
        self._count = 0

    async def revision(self, spec: FunctionSpec, code_path: str | None = None) -> Revision:
        return make_revision(spec, await self.backend.resolve(spec, code_path, lambda line: None))

    def shell(self, script: str, **fields: Any) -> FunctionSpec:
        """A function that is a shell script in the busybox image."""
        fields.setdefault("network", "none")
        return FunctionSpec(
            name="probe",
            image=self.image,
            entrypoint=("/busybox", "sh", "-c"),
            command=(script,),
            pool=PoolSpec(),
            **fields,
        )

    def request(self, revision: Revision, *, printed: Printed | None = None, env: dict[str, str] | None = None) -> Any:
        self._count += 1
        return StartRequest(
            instance_id=f"i{self._count}-{id(self):x}",
            revision=revision,
            env=env or {},
            port=PORT,
            on_output=printed or self.printed,
        )

    async def run(self, script: str, *, printed: Printed | None = None, **fields: Any) -> DockerInstance:
        """Start a shell script."""
        request = self.request(await self.revision(self.shell(script, **fields)), printed=printed)
        running = await self.backend.start(request)
        assert isinstance(running, DockerInstance)
        return running

    async def left(self) -> list[str]:
        """The names of this daemon's containers that exist."""
        return await trio.to_thread.run_sync(left_of, self.url, self.backend.daemon_id)

    async def engine(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Ask the engine behind the backend's back."""

        def ask() -> Any:
            with contextlib.closing(client_of(self.url)) as client:
                return getattr(client, method)(*arguments, **options)

        return await trio.to_thread.run_sync(ask)


def left_of(url: str, daemon_id: str) -> list[str]:
    with contextlib.closing(client_of(url)) as client:
        rows = client.containers(all=True, filters={"label": [f"{LABEL_DAEMON}={daemon_id}"]})
        return sorted(name for row in rows for name in row["Names"])


def remove_left(url: str, daemon_id: str) -> None:
    """So that a test that failed is the only one that does."""
    with contextlib.closing(client_of(url)) as client:
        for name in left_of(url, daemon_id):
            client.remove_container(name, force=True, v=True)


FOREVER = "while :; do /busybox sleep 1000; done"
ANSWER = b"HTTP/1.1 "
GET = b"GET / HTTP/1.0\r\n\r\n"


async def ask(running: Any, port: int = PORT) -> bytes:
    """The first nine bytes that whatever listens in the instance says; waits until something listens."""
    with trio.fail_after(20):
        while True:
            try:
                channel = await running.dial(port)
            except ChannelClosed:
                await trio.sleep(0.01)
                continue
            try:
                await channel.send_all(GET)
                return bytes(await channel.receive())[:9]
            except ChannelClosed:
                await trio.sleep(0.01)
            finally:
                channel.close()


async def next_exit(backend: DockerBackend) -> InstanceExited:
    event = await next_event(backend)
    assert isinstance(event, InstanceExited), event
    return event


async def next_event(backend: DockerBackend) -> BackendEvent:
    """The backend's next event."""
    with trio.fail_after(30):
        async with contextlib.aclosing(backend.events()) as events:
            async for event in events:
                return event
    raise AssertionError("the events ended")


@contextlib.asynccontextmanager
async def entered(backend: DockerBackend, url: str, image: str) -> AsyncIterator[Kit]:
    """Enter a backend; at the end nothing of it may be left on the engine."""
    async with backend:
        kit = Kit(backend, url, image)
        try:
            yield kit
            assert await kit.left() == []
        finally:
            await trio.to_thread.run_sync(remove_left, url, backend.daemon_id)
            await backend.cleanup()
    with contextlib.closing(client_of(url)) as client:
        label = {"label": [f"{LABEL_DAEMON}={backend.daemon_id}"]}
        assert client.networks(filters=label) == []
        assert not client.volumes(filters=label)["Volumes"]


@contextlib.asynccontextmanager
async def earlier(backend: DockerBackend, url: str, image: str) -> AsyncIterator[Kit]:
    """A backend that goes without its instances, for a later one to find; should the test fail in it, nothing stays."""
    try:
        async with backend:
            yield Kit(backend, url, image)
    except BaseException:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(remove_left, url, backend.daemon_id)
        raise


@pytest.fixture(scope="module")
def image(docker_host: str) -> Iterator[str]:
    """Busybox; its user is root, as most images' is."""
    name = f"poold-test-{uuid.uuid4().hex[:8]}:1"
    import_image(docker_host, name, busybox_tar(), ['CMD ["/busybox","sleep","1000"]'])
    yield name
    with contextlib.closing(client_of(docker_host)) as client:
        client.remove_image(name)


@pytest.fixture
async def kit(docker_host: str, image: str, tmp_path: Path) -> AsyncIterator[Kit]:
    """A backend of a daemon of its own."""
    async with entered(make_backend(docker_host, tmp_path), docker_host, image) as entered_kit:
        yield entered_kit


def make_backend(url: str, tmp_path: Path, daemon_id: str = "") -> DockerBackend:
    return DockerBackend(daemon_id or uuid.uuid4().hex, tmp_path, docker_host=url)


def container_of(running: Running) -> str:
    """The id of its container."""
    assert isinstance(running, DockerInstance)
    return running.container_id


def write_code(folder: Path, script: str) -> str:
    """A code directory with this shell script as its bootstrap."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "bootstrap").write_text(script)
    (folder / "bootstrap").chmod(0o755)
    return str(folder)
