"""The docker backend when the engine is away, restarts, is far or wants TLS: with private engines."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pool_docker_kit as kit_module
import pytest
import trio
from pool_docker_kit import ANSWERING, FOREVER, Printed, ask, entered, next_event, write_code

from pool.backends.base import BackendBack, BackendLost, InstanceExited
from pool.backends.docker import DockerBackend
from pool.errors import BackendUnavailable
from pool.spec import FunctionSpec
from scripts.engine import Engine

ON_SIGNAL = "trap 'echo usr1' USR1; echo ready; while :; do /busybox sleep 0.05; done"


def import_busybox(url: str) -> str:
    name = f"poold-test-{uuid.uuid4().hex[:8]}:1"
    kit_module.import_image(url, name, kit_module.busybox_tar(), ['CMD ["/busybox","sleep","1000"]'])
    return name


@contextlib.contextmanager
def private_engine(*extra: str) -> Iterator[Engine]:
    """Beside the other one: it leaves packet filter and bridges alone. Its path is short, as sockets' must be."""
    with Engine(f"/tmp/poold-test-{uuid.uuid4().hex[:8]}", extra=extra, own_rules=False) as engine:
        yield engine


@pytest.mark.trio
async def test_the_engine_crashes_under_running_instances(tmp_path: Path) -> None:
    """An engine that comes back ends what ran before; no event says so, only the listing does."""
    with private_engine() as engine:
        image = import_busybox(engine.url)
        backend = DockerBackend(uuid.uuid4().hex, tmp_path, docker_host=engine.url)
        async with entered(backend, engine.url, image) as kit:
            first, second = await kit.run(FOREVER), await kit.run(FOREVER)
            await first.freeze()
            await trio.to_thread.run_sync(engine.kill)
            lost = await next_event(backend)
            assert isinstance(lost, BackendLost)
            assert engine.url in lost.detail
            with pytest.raises(BackendUnavailable, match="cannot be reached"):
                await kit.run(FOREVER)
            with pytest.raises(BackendUnavailable):
                await backend.find()
            await first.thaw()
            await trio.to_thread.run_sync(engine.start)
            ended = [await next_event(backend), await next_event(backend)]
            assert {event.instance_id for event in ended if isinstance(event, InstanceExited)} == {
                first.instance_id,
                second.instance_id,
            }
            assert isinstance(await next_event(backend), BackendBack)
            third = await kit.run(FOREVER)
            for running in (first, second, third):
                await running.stop(0)


@pytest.mark.trio
async def test_instances_that_survive_the_engine_print_on_and_those_that_do_not_are_told(tmp_path: Path) -> None:
    with private_engine("--live-restore") as engine:
        image = import_busybox(engine.url)
        backend = DockerBackend(uuid.uuid4().hex, tmp_path, docker_host=engine.url)
        async with entered(backend, engine.url, image) as kit:
            lives, dies = await kit.run(ON_SIGNAL), await kit.run(FOREVER, printed=Printed())
            await kit.printed.wait_for("ready\n")
            await trio.to_thread.run_sync(engine.kill)
            assert isinstance(await next_event(backend), BackendLost)
            assert dies.pid is not None
            os.kill(dies.pid, signal.SIGKILL)
            await trio.to_thread.run_sync(engine.start)
            event = await next_event(backend)
            assert isinstance(event, InstanceExited)
            assert event.instance_id == dies.instance_id
            assert isinstance(await next_event(backend), BackendBack)
            await kit.engine("kill", lives.container_id, signal="USR1")
            await kit.printed.wait_for("usr1\n")
            for running in (lives, dies):
                await running.stop(0)


@pytest.mark.trio
async def test_a_stop_that_the_engine_misses_is_made_up_for(tmp_path: Path) -> None:
    with private_engine("--live-restore") as engine:
        image = import_busybox(engine.url)
        backend = DockerBackend(uuid.uuid4().hex, tmp_path, docker_host=engine.url)
        async with entered(backend, engine.url, image) as kit:
            running = await kit.run(FOREVER)
            await trio.to_thread.run_sync(engine.kill)
            with pytest.raises(BackendUnavailable):
                await running.stop(0)
            await trio.to_thread.run_sync(engine.start)
            while not isinstance(await next_event(backend), BackendBack):
                pass
            assert len(await kit.left()) == 1
            backend._census.stray_after_s = 0.0
            assert await backend.reconcile() == 1


# TLS


class Certificates:
    """A certificate authority in a directory, by the openssl command."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._openssl("req", "-x509", *self._new_key("ca"), "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")

    def issue(self, name: str, usage: str) -> None:
        """NAME.pem and NAME-key.pem, for 127.0.0.1."""
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName=IP:127.0.0.1\nextendedKeyUsage={usage}\n")
        self._openssl("req", *self._new_key(name), "-out", f"{name}.csr", "-subj", f"/CN={name}")
        ca = ("-CA", "ca.pem", "-CAkey", "ca-key.pem", "-CAcreateserial")
        self._openssl("x509", "-req", "-in", f"{name}.csr", *ca, "-out", f"{name}.pem", "-extfile", str(extensions))

    def install(self, name: str, target: Path, ca: Path) -> None:
        """Put them where a client looks, as a renewal does: new files in the place of the old."""
        target.mkdir(exist_ok=True)
        for source, file in (
            (ca, "ca.pem"),
            (self.folder / f"{name}.pem", "cert.pem"),
            (self.folder / f"{name}-key.pem", "key.pem"),
        ):
            shutil.copy(source, target / f".{file}")
            (target / f".{file}").rename(target / file)

    def _new_key(self, name: str) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}-key.pem")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.trio
async def test_an_engine_over_tls_whose_certificates_are_replaced(tmp_path: Path) -> None:
    ours, foreign = Certificates(tmp_path / "ours"), Certificates(tmp_path / "foreign")
    ours.issue("server", "serverAuth")
    for client in ("client", "renewed"):
        ours.issue(client, "clientAuth")
    foreign.issue("client", "clientAuth")
    ca, used = tmp_path / "ours/ca.pem", tmp_path / "used"
    ours.install("client", used, ca)
    url = f"tcp://127.0.0.1:{free_port()}"
    server = (f"--tlscert={tmp_path}/ours/server.pem", f"--tlskey={tmp_path}/ours/server-key.pem")
    with private_engine(f"--host={url}", "--tlsverify", f"--tlscacert={ca}", *server) as engine:
        with pytest.raises(BackendUnavailable, match="TLS failed") as caught:
            await DockerBackend("x", tmp_path, docker_host=url, cert_path="", tls_verify=False).__aenter__()
        assert "DOCKER_CERT_PATH" in caught.value.hint
        backend = DockerBackend(uuid.uuid4().hex, tmp_path, docker_host=url, cert_path=used, tls_verify=True)
        async with entered(backend, engine.url, import_busybox(engine.url)) as kit:
            running = await kit.run(f"echo ready; {ANSWERING}")
            await kit.printed.wait_for("ready\n")
            foreign.install("client", used, ca)
            with pytest.raises(BackendUnavailable, match="TLS failed"):
                await backend.find()
            ours.install("renewed", used, ca)
            assert await backend.find() == []
            assert await ask(running) == b"HTTP/1.1 "
            await running.stop(0)
            # The engine might be anywhere: code goes there through a volume, and stays read-only.
            code = write_code(
                tmp_path / "code",
                "#!/bin/sh\ntouch /code/x && echo written\ncat /code/bootstrap\necho end\nsleep 1000\n",
            )
            revision = await kit.revision(FunctionSpec(name="far", code=code, network="none"), code)
            for _ in range(2):
                copied = Printed()
                far = await backend.start(kit.request(revision, printed=copied))
                assert (await copied.wait_for("\nend\n")).startswith("#!/bin/sh\ntouch")
                await far.stop(0)
            assert len((await kit.engine("volumes"))["Volumes"]) == 1
            assert (await backend.describe())["code"].startswith("copied")


# No engine


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("unix:///no/such/docker.sock", "no such socket"),
        ("tcp://127.0.0.1:1", "connection refused"),
        ("ssh://host", "cannot reach an engine at 'ssh://host'"),
        ("tcp://127.0.0.1:port", "cannot reach an engine"),
        ("nonsense", "cannot reach an engine"),
    ],
)
@pytest.mark.trio
async def test_no_engine_there(tmp_path: Path, host: str, words: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        async with DockerBackend("x", tmp_path, docker_host=host):
            pass
    assert words in caught.value.message
    assert host in caught.value.message
    assert caught.value.hint


@pytest.mark.trio
async def test_something_else_listens_there(tmp_path: Path) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"SSH-2.0-OpenSSH_9\r\n\r\n")

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(BackendUnavailable) as caught:
            async with DockerBackend("x", tmp_path, docker_host=f"tcp://127.0.0.1:{port}"):
                pass
        assert str(port) in caught.value.message
        nursery.cancel_scope.cancel()
