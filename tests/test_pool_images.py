"""Images: looked up, pulled by a real engine from a registry that wants credentials, pinned by their id."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import http.server
import json
import os
import platform
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pool_docker_kit as kit_module
import pytest
import trio

from pool.backends.docker_client import Endpoint, EngineClient
from pool.errors import ArtifactError
from pool.images import Credentials, Images, Progress, RegistryAuth, pull_error, split_name

USER, PASSWORD = "puller", "s3cret"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Registry(http.server.ThreadingHTTPServer):
    """The Docker Registry HTTP API V2, as far as pulling one image needs it; Basic authentication."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        # A name and a content of its own each time: an engine fetches nothing that it has already.
        self.repository = f"team/{uuid.uuid4().hex[:8]}"
        tar = kit_module.busybox_tar(unique=self.repository, noise=os.urandom(3_000_000).hex())
        layer = gzip.compress(tar, 1)
        config = json.dumps(
            {
                "architecture": ARCHITECTURES[platform.machine()],
                "os": "linux",
                "config": {"Entrypoint": ["/busybox"], "Cmd": ["sleep", "9"], "User": "app"},
                "rootfs": {"type": "layers", "diff_ids": [digest_of(tar)]},
                "history": [{"created": "2026-01-01T00:00:00Z"}],
            }
        ).encode()
        parts = [(LAYER, layer), (CONFIG, config)]
        described = [{"mediaType": kind, "size": len(data), "digest": digest_of(data)} for kind, data in parts]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[1], "layers": described[:1]}
        self.image_id = digest_of(config)
        self.manifest = json.dumps(manifest).encode()
        self.blobs = {digest_of(data): data for _, data in parts}

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @property
    def image(self) -> str:
        return f"{self.host}/{self.repository}:v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """An engine tries TLS first, and hangs up when it does not get it."""


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {wanted}":
            return self._say(401, b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}', "json")
        base = f"/v2/{self.server.repository}"
        if self.path == "/v2/":
            return self._say(200, b"{}", "application/json")
        if self.path in (f"{base}/manifests/v1", f"{base}/manifests/{digest_of(self.server.manifest)}"):
            return self._say(200, self.server.manifest, MANIFEST)
        blob = self.server.blobs.get(self.path.removeprefix(f"{base}/blobs/"))
        if blob is not None:
            return self._say(200, blob, "application/octet-stream")
        return self._say(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}', "json")

    do_HEAD = do_GET

    def _say(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Docker-Content-Digest", digest_of(body))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        if status == 401:
            self.send_header("WWW-Authenticate", 'Basic realm="test"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
async def engine(docker_host: str, registry: Registry) -> AsyncIterator[EngineClient]:
    client = EngineClient(Endpoint.find(docker_host))
    await client.negotiate()
    yield client

    def forget(sdk: Any) -> None:
        for image in sdk.images(all=True):
            if any(registry.repository in name for name in [*(image["RepoTags"] or []), *(image["RepoDigests"] or [])]):
                sdk.remove_image(image["Id"], force=True)

    await client.call(forget)
    client.close()


def login(registry: Registry, password: str) -> dict[str, dict[str, str]]:
    return {registry.host: {"username": USER, "password": password}}


@pytest.mark.parametrize("kind", ["mapping", "file"])
@pytest.mark.trio
async def test_pull_with_credentials(engine: EngineClient, registry: Registry, tmp_path: Path, kind: str) -> None:
    source: RegistryAuth = login(registry, PASSWORD)
    if kind == "file":
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        source = tmp_path / "config.json"
        source.write_text(json.dumps({"auths": {registry.host: {"auth": token}}}))
    images, lines = Images(engine, source), list[str]()
    assert await images.find(registry.image) is None
    image = await images.resolve(registry.image, lines.append)
    assert image.id == registry.image_id
    assert (image.entrypoint, image.command, image.user) == (("/busybox",), ("sleep", "9"), "app")
    assert image.size_mb >= 5
    assert lines[0] == f"pulling {registry.image} with credentials"
    assert lines[-1] == f"pulled {registry.image}"
    lines.clear()
    assert await images.resolve(registry.image, lines.append) == image
    assert lines == []  # it is there: nothing is pulled
    by_digest = f"{registry.image.rpartition(':')[0]}@{digest_of(registry.manifest)}"
    assert (await images.resolve(by_digest, lines.append)).id == image.id


@pytest.mark.parametrize(
    ("password", "tag", "words"),
    [
        ("wrong", ":v1", "credentials poold has for it were refused"),
        (None, ":v1", "poold has no credentials for it"),
        (PASSWORD, ":v2", "there is no image"),
    ],
)
@pytest.mark.trio
async def test_pulls_that_are_refused(
    engine: EngineClient, registry: Registry, password: str | None, tag: str, words: str
) -> None:
    name = registry.image.removesuffix(":v1") + tag
    images = Images(engine, login(registry, password) if password else {})
    with pytest.raises(ArtifactError) as caught:
        await images.resolve(name, lambda line: None)
    assert words in caught.value.message
    assert name in caught.value.message
    assert f"docker build -t {name}" in caught.value.hint


@pytest.mark.trio
async def test_credentials_are_read_again_for_each_pull(
    engine: EngineClient, registry: Registry, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    images = Images(engine, path)
    for password, good in (("expired", False), (PASSWORD, True)):
        token = base64.b64encode(f"{USER}:{password}".encode()).decode()
        path.write_text(json.dumps({"auths": {registry.host: {"auth": token}}}))
        with contextlib.nullcontext() if good else pytest.raises(ArtifactError):
            assert (await images.resolve(registry.image, lambda line: None)).id == registry.image_id


@pytest.mark.trio
async def test_a_registry_that_is_not_there(engine: EngineClient) -> None:
    with pytest.raises(ArtifactError) as caught:
        await Images(engine, {}).resolve("127.0.0.1:1/some/image:1", lambda line: None)
    assert "cannot reach its registry" in caught.value.message
    assert "docker build -t 127.0.0.1:1/some/image:1" in caught.value.hint


@pytest.mark.trio
async def test_a_cancelled_pull_stops(engine: EngineClient, registry: Registry) -> None:
    """When it has just begun; the engine is then free to be asked again."""
    images = Images(engine, login(registry, PASSWORD))
    with trio.CancelScope() as scope:
        await images.resolve(registry.image, lambda line: scope.cancel())
    assert scope.cancelled_caught
    assert (await images.resolve(registry.image, lambda line: None)).id == registry.image_id


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"auths": {"a": 1}}', "cannot be read"), (None, "there is no file")],
)
def test_credentials_that_cannot_be_read(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ArtifactError, match=words):
        Credentials(path).header("registry.example/image")


def test_credentials_are_for_their_registry_only() -> None:
    source = {"registry.example:5000": {"username": "u", "password": "p"}}
    header = Credentials(source).header("registry.example:5000/a/b:1")
    assert header is not None
    assert json.loads(base64.urlsafe_b64decode(header)) == source["registry.example:5000"]
    assert Credentials(source).header("other.example/a/b:1") is None
    assert Credentials(source).header("busybox") is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("busybox", ("busybox", "latest")),
        ("busybox:1.36", ("busybox", "1.36")),
        ("host:5000/a/b", ("host:5000/a/b", "latest")),
        ("host:5000/a/b:1", ("host:5000/a/b", "1")),
        ("host:5000/a@sha256:00", ("host:5000/a", "sha256:00")),
    ],
)
def test_names(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_progress_is_one_line() -> None:
    progress = Progress("image:1")
    for document in (
        {"status": "Pulling from library/image", "id": "1"},
        {"status": "Already exists", "id": "a"},
        {"status": "Pulling fs layer", "id": "b"},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 1 << 20, "total": 4 << 20}},
        {"status": "Waiting", "id": "c"},
        {"status": "Digest: sha256:00"},
    ):
        progress.take(document)
    assert progress.line() == "pulling image:1: 1 of 3 layers, 1.0 of 4.0 MB"
    progress.take({"status": "Download complete", "id": "b", "progressDetail": {}})
    progress.take({"status": "Pull complete", "id": "b", "progressDetail": {}})
    assert progress.line() == "pulling image:1: 2 of 3 layers, 4.0 of 4.0 MB"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Get https://r/v2/: dial tcp: lookup r: no such host", "cannot reach its registry"),
        ("net/http: request canceled while waiting (Client.Timeout exceeded)", "cannot reach its registry"),
        ("pull access denied for x, repository does not exist or may require 'docker login'", "no permission"),
        ("manifest for x:1 not found: manifest unknown", "there is no image"),
        ("toomanyrequests: slow down", "failed: toomanyrequests"),
    ],
)
def test_what_a_refusal_means(message: str, words: str) -> None:
    error = pull_error("x:1", message, with_credentials=False)
    assert words in error.message
    assert "docker build -t x:1" in error.hint
