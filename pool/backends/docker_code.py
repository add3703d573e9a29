"""What code functions run on and in: the userland image, and the code itself where the engine sees other files.

An engine on this host mounts the code directory. One that is reached over TCP may be on another host, so there the
code is copied once into a volume, which instances mount read-only. (Copying into each container is no way: the engine
refuses it for a read-only root.) A volume belongs to one run of the daemon, for only that knows whether it is whole.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from dataclasses import dataclass
from typing import Any

import docker.errors
import trio
from docker import APIClient

from pool.backends.docker_client import EngineClient
from pool.backends.docker_container import LABEL_DAEMON, LABEL_RUN, Mount, short_id
from pool.backends.docker_userland import LABEL_USERLAND, REPOSITORY, Userland, host_userland, remote_userland
from pool.errors import ArtifactError, BackendUnavailable

LABEL_CODE = "io.poold.code"
COPY_TIMEOUT_S = 600.0
UNUSED_S = 3600.0  # a volume that no start has asked for so long goes, if nothing has it mounted
SPOOL_BYTES = 16_777_216  # larger archives go through a file


@dataclass(slots=True)
class _Volume:
    name: str
    used_at: float


class CodeStore:
    """Of one daemon on one engine."""

    def __init__(self, engine: EngineClient, daemon_id: str, run_id: str, shares_files: bool) -> None:
        self._engine = engine
        self._daemon_id = daemon_id
        self._run_id = run_id
        self.shares_files = shares_files
        self._userland: tuple[str, Userland] | None = None
        self._volumes: dict[str, _Volume] = {}  # by content digest
        self._lock = trio.Lock()

    async def userland(self) -> tuple[str, tuple[Mount, ...]]:
        """The id of the empty image and what to mount into it; imported when it is first needed.

        Raises BackendUnavailable, docker's APIError.
        """
        if self._userland is None:
            async with self._lock:
                if self._userland is None:
                    make = host_userland if self.shares_files else remote_userland
                    layout = await trio.to_thread.run_sync(make)
                    image_id = await self._engine.call(lambda client: _import(client, layout))
                    self._userland = image_id, layout
        image_id, layout = self._userland
        return image_id, layout.mounts

    async def mount(self, code_path: str, digest: str, target: str) -> Mount:
        """How an instance sees the code directory. Raises ArtifactError, BackendUnavailable, docker's APIError."""
        if self.shares_files:
            return Mount(code_path, target)
        async with self._lock:
            known = self._volumes.get(digest)
        if known is None:
            image_id, _ = await self.userland()
            async with self._lock:
                known = self._volumes.get(digest)
                if known is None:
                    name = await self._fill(image_id, code_path, digest)
                    known = self._volumes[digest] = _Volume(name, trio.current_time())
        known.used_at = trio.current_time()
        return Mount(known.name, target, volume=True)

    def forget_userland(self) -> None:
        """Somebody removed the image: the next userland() imports it again."""
        self._userland = None

    async def tidy(self, everything: bool = False) -> None:
        """Remove volumes of earlier runs, and of this one what was not used for an hour (or `everything`, with the
        userland image). What containers have mounted stays. Raises BackendUnavailable."""
        keep = {} if everything else self._volumes
        old_s = trio.current_time() - UNUSED_S
        for digest in [digest for digest, volume in self._volumes.items() if everything or volume.used_at < old_s]:
            del self._volumes[digest]
        names = {volume.name for volume in keep.values()}
        if not self.shares_files:
            async with self._lock:
                await self._engine.call(lambda client: self._remove_volumes(client, names))
        if everything:
            self._userland = None
            await self._engine.call(_remove_userlands)

    async def _fill(self, image_id: str, code_path: str, digest: str) -> str:
        name = f"poold-{short_id(self._daemon_id)}-code-{digest.removeprefix('sha256:')[:12]}-{self._run_id}"
        try:
            await self._engine.call(
                lambda client: self._copy(client, image_id, name, code_path, digest), timeout_s=COPY_TIMEOUT_S
            )
        except BaseException:
            with trio.move_on_after(10, shield=True):
                await self._engine.call(lambda client: self._remove_volumes(client, set(), only=name))
            raise
        return name

    def _copy(self, client: APIClient, image_id: str, name: str, code_path: str, digest: str) -> None:
        """Create the volume, and copy through a container that is never started: the engine mounts it for that."""
        labels = {LABEL_DAEMON: self._daemon_id, LABEL_RUN: self._run_id}
        client.create_volume(name, labels={**labels, LABEL_CODE: digest})
        mount: dict[str, Any] = Mount(name, "/code", read_only=False, volume=True).as_json()
        config = {
            "Image": image_id,
            "Cmd": ["/never-started"],
            "Labels": labels,
            "HostConfig": {"NetworkMode": "none", "Mounts": [mount]},
        }
        container = _untyped(client).create_container_from_config(config, f"{name}-copy")["Id"]
        try:
            with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as archive:
                try:
                    with tarfile.open(fileobj=archive, mode="w") as tar:
                        tar.add(code_path, arcname=".", filter=_as_root)
                except OSError as exc:
                    raise ArtifactError(f"the code in {code_path} cannot be read: {exc}") from exc
                archive.seek(0)
                client.put_archive(container, "/code", archive)
        finally:
            client.remove_container(container, force=True)

    def _remove_volumes(self, client: APIClient, keep: set[str], only: str | None = None) -> None:
        filters = {"label": [f"{LABEL_DAEMON}={self._daemon_id}", LABEL_CODE]}
        for volume in client.volumes(filters=filters)["Volumes"] or ():
            if volume["Name"] in keep or only not in (None, volume["Name"]):
                continue
            try:
                client.remove_volume(volume["Name"])
            except docker.errors.APIError as exc:
                if exc.status_code not in (404, 409):  # gone, or mounted somewhere
                    raise


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _import(client: APIClient, layout: Userland) -> str:
    reference = f"{REPOSITORY}:{layout.tag}"
    try:
        return str(_untyped(client).inspect_image(reference)["Id"])
    except docker.errors.NotFound:
        pass
    answer = _untyped(client).import_image_from_data(
        layout.archive, repository=REPOSITORY, tag=layout.tag, changes=[f"LABEL {LABEL_USERLAND}={layout.tag}"]
    )
    last = json.loads(answer.strip().splitlines()[-1])
    if "status" not in last:
        raise BackendUnavailable(f"the engine cannot import poold's base image: {last.get('error', last)}")
    return str(last["status"])


def _remove_userlands(client: APIClient) -> None:
    for image in client.images(filters={"label": [LABEL_USERLAND]}):
        try:
            _untyped(client).remove_image(image["Id"])
        except docker.errors.APIError as exc:
            if exc.status_code not in (404, 409):  # gone, or containers of another daemon's use it
                raise


def _untyped(client: APIClient) -> Any:
    """For methods that the SDK's type stubs leave without types."""
    return client
