"""The docker backend: instances are containers of a Docker engine, here or elsewhere.

The SDK's blocking calls run in threads (docker_client), what goes on for long is read in trio (docker_stream). What
exists is known by labels: whatever was interrupted, here or in a daemon that is no more, is found by them.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import docker.errors
import msgspec
import structlog
import trio

from pool import netns
from pool.backends.base import BackendEvent, Found, InstanceExited, OnOutput, OnProgress, Running, StartRequest
from pool.backends.docker_census import Census
from pool.backends.docker_client import Endpoint, EngineClient
from pool.backends.docker_code import CodeStore
from pool.backends.docker_container import (
    LABEL_DAEMON,
    LABEL_INSTANCE,
    MIN_MEMORY_MB,
    Mount,
    container_config,
    container_name,
    effective_user,
    is_root,
    labels_of,
    short_id,
)
from pool.backends.docker_errors import start_error
from pool.backends.docker_events import EventFeed
from pool.backends.docker_network import Networks
from pool.backends.docker_running import DockerInstance, Place, remove_container
from pool.backends.docker_stream import EngineRefused
from pool.code import check_code, code_facts
from pool.errors import ArtifactError, BackendUnavailable, StartError
from pool.images import Image, Images, RegistryAuth
from pool.spec import Artifact, FunctionSpec, Revision

log = structlog.get_logger("poold.docker")

EVENTS_KEPT = 1024  # unread events; then the engine's stream is read no further until they are
CLEAN_UP_S = 20.0  # for removing what a failed or cancelled start has made; recovery does the rest
RECONCILE_EVERY_S = 30.0
OWN_NETWORK = "poold"


class DockerBackend:
    """See pool.backends.base.Backend.

    `docker_host`, `cert_path`, `tls_verify`: where the engine is, else DOCKER_HOST, DOCKER_CERT_PATH and
    DOCKER_TLS_VERIFY. `registry_auth`: see images.Credentials. `network_name`: the docker network that "bridge"
    stands for; by default poold's own, which has the daemon's id in its name. `shares_files`: the engine sees this
    host's files; None: if its socket is here.
    """

    name = "docker"

    def __init__(
        self,
        daemon_id: str,
        state_dir: Path,
        *,
        docker_host: str | None = None,
        cert_path: str | Path | None = None,
        tls_verify: bool | None = None,
        registry_auth: RegistryAuth = None,
        network_name: str = OWN_NETWORK,
        shares_files: bool | None = None,
    ) -> None:
        self.daemon_id = daemon_id
        self.state_dir = state_dir
        self._endpoint = (docker_host, cert_path, tls_verify)
        self._registry_auth = registry_auth
        self._network_name = f"{OWN_NETWORK}-{short_id(daemon_id)}" if network_name == OWN_NETWORK else network_name
        self._shares_files = shares_files
        self._run_id = secrets.token_hex(4)
        self._version: dict[str, str] = {}
        self._send, self._receive = trio.open_memory_channel[BackendEvent](EVENTS_KEPT)

    @property
    def isolation(self) -> str:
        """See Backend.isolation."""
        return "Docker containers: own namespaces, limits, read-only root, no capabilities, no traffic between them"

    async def __aenter__(self) -> DockerBackend:
        endpoint = Endpoint.find(*self._endpoint)
        self._engine = EngineClient(endpoint)
        shares_files = endpoint.is_unix if self._shares_files is None else self._shares_files
        self._images = Images(self._engine, self._registry_auth)
        self._code = CodeStore(self._engine, self.daemon_id, self._run_id, shares_files)
        self._networks = Networks(self._engine, self._network_name, self.daemon_id)
        self._census = Census(self._engine, self.daemon_id, self._run_id, self._report, self._attach_again)
        label = f"{LABEL_DAEMON}={self.daemon_id}"
        self._feed = EventFeed(self._engine, label, LABEL_INSTANCE, self._census, self._send.send)
        async with AsyncExitStack() as stack:
            stack.callback(self._engine.close)
            self._version = await self._engine.negotiate()
            await self._feed.check()
            stack.callback(self._census.release)
            self._nursery = await stack.enter_async_context(trio.open_nursery())
            await self._nursery.start(self._feed.run)
            self._nursery.start_soon(self._reconcile_for_ever)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._nursery.cancel_scope.cancel()
        await self._stack.aclose()

    async def cleanup(self) -> None:
        """For a daemon that ends and keeps nothing: remove its network, code volumes and base image, as far as
        nothing uses them. Raises BackendUnavailable."""
        try:
            await self._code.tidy(everything=True)
            await self._networks.remove()
        except docker.errors.APIError as exc:
            raise BackendUnavailable(f"the engine refused to clean up: {exc.explanation}") from exc

    async def describe(self) -> dict[str, str]:
        """See Backend.describe."""
        try:
            info: dict[str, Any] = await self._engine.query(lambda client: client.info())
        except docker.errors.APIError as exc:
            raise BackendUnavailable(f"the engine does not describe itself: {exc.explanation}") from exc
        inside = netns.can_enter()
        return {
            "engine": f"{self._engine.endpoint.host} (Docker {self._version.get('Version', '?')})",
            "api": self._engine.version,
            "cgroup": f"v{info.get('CgroupVersion', '1')}, {info.get('CgroupDriver', '?')}",
            "storage": str(info.get("Driver", "?")),
            "runtimes": ", ".join(sorted(info.get("Runtimes") or {})),
            "reached by": "their network namespaces" if inside else "their addresses on the bridge",
            "frozen by": "their cgroup's files, else docker pause",
            "code": "mounted from this host" if self._code.shares_files else "copied into volumes of the engine",
            "network": self._network_name,
        }

    # Artifacts

    async def resolve(self, spec: FunctionSpec, code_path: str | None, on_progress: OnProgress) -> Artifact:
        """See Backend.resolve."""
        _check_limits(spec)
        if code_path is None and spec.image is None:
            raise ArtifactError(f"{spec.name} names neither an image nor code", hint="set one of them")
        try:
            await self._networks.check(spec.network)
            artifact = Artifact(digest="")
            if spec.image is not None:
                artifact = _of_image(await self._images.resolve(spec.image, on_progress))
            if code_path is not None:
                artifact = await self._with_code(spec, code_path, artifact)
        except docker.errors.APIError as exc:
            raise BackendUnavailable(f"the engine refused a question: {exc.explanation}") from exc
        if code_path is None and not any((artifact.entrypoint, artifact.command, spec.entrypoint, spec.command)):
            raise ArtifactError(f"the image {spec.image} does not say what to run", hint="set entrypoint or command")
        _check_capabilities(spec, artifact)
        return artifact

    async def _with_code(self, spec: FunctionSpec, code_path: str, base: Artifact) -> Artifact:
        user = effective_user(spec, base)

        def look() -> tuple[str, int]:
            check_code(spec, code_path, as_other=self._is_other(user, code_path))
            facts = code_facts(code_path)
            return facts.digest, facts.size_mb

        digest, size_mb = await trio.to_thread.run_sync(look)
        if base.image is None:
            await self._code.userland()
        digest = f"{base.image}+{digest}" if base.image else digest
        return msgspec.structs.replace(base, digest=digest, code_path=code_path, size_mb=base.size_mb + size_mb)

    def _is_other(self, user: str, code_path: str) -> bool:
        """Whether code in a container is somebody else's than `user`'s. Copies belong to root."""
        uid = user.partition(":")[0]
        if not user or is_root(user):
            return False
        if not self._code.shares_files or not uid.isdigit():
            return True
        try:
            return Path(code_path).stat().st_uid != int(uid)
        except OSError:
            return False  # check_code says it better

    # Instances

    async def start(self, request: StartRequest) -> Running:
        """See Backend.start."""
        spec = request.revision.spec
        name = container_name(self.daemon_id, spec.name, request.instance_id)
        instance = DockerInstance(self._engine, request.instance_id, name, request.on_output)
        self._census.add(instance)
        try:
            try:
                await self._create(instance, request)
            except docker.errors.APIError as exc:
                if not await self._repair(exc, instance):
                    raise
                await self._create(instance, request)
        except BaseException as exc:
            with trio.move_on_after(CLEAN_UP_S, shield=True):
                await self._undo(instance)
            if isinstance(exc, docker.errors.APIError):
                raise start_error(str(exc.explanation or exc), exc.status_code or 0, request) from exc
            if isinstance(exc, EngineRefused):
                raise start_error(exc.message, exc.status, request) from exc
            raise
        instance.ready = True
        if instance.exited is not None:
            # start() has not returned, so nobody can miss it in `exited` should the events be full.
            with contextlib.suppress(trio.WouldBlock):
                self._send.send_nowait(InstanceExited(instance.instance_id, instance.exited))
        return instance

    async def _create(self, instance: DockerInstance, request: StartRequest) -> None:
        """Create, attach, start: three round trips, and one for the process's id."""
        artifact = request.revision.artifact
        mounts: list[Mount] = []
        image = artifact.image
        if image is None:
            image, userland = await self._code.userland()
            mounts += userland
        if artifact.code_path is not None:
            digest = artifact.digest.rpartition("+")[2]
            mounts.append(await self._code.mount(artifact.code_path, digest, request.code_target))
        config = container_config(
            request,
            image=image,
            network=await self._networks.for_spec(request.revision.spec.network),
            labels=labels_of(request, self.daemon_id, self._run_id),
            mounts=mounts,
        )
        instance.container_id = await self._engine.call(lambda client: _create(client, config, instance.name))
        await instance.attach(self._nursery)
        info, place = await self._engine.call(lambda client: _start(client, instance.container_id))
        instance.learn(info, place)

    async def _repair(self, exc: docker.errors.APIError, instance: DockerInstance) -> bool:
        """When what the daemon itself had made was removed by somebody, make it again: then a second try helps."""
        text = str(exc.explanation or "")
        if exc.status_code != 404:
            return False
        if "network" in text and self._network_name in text:
            self._networks.forget()
        elif "No such image" in text and instance.container_id == "":
            self._code.forget_userland()
        else:
            return False
        if instance.container_id:
            await remove_container(self._engine, instance.container_id)
            instance.container_id = ""
        return True

    async def _undo(self, instance: DockerInstance) -> None:
        """Remove what a start has made. By name: a create that was cut off may have gone through all the same."""
        try:
            await remove_container(self._engine, instance.container_id or instance.name)
        except (BackendUnavailable, docker.errors.APIError):
            pass  # nobody knows it any more, so reconcile() removes it when the engine is back
        finally:
            self._census.drop(instance)
            await instance.let_go()

    def events(self) -> AsyncGenerator[BackendEvent, None]:
        """See Backend.events."""
        return self._events()

    async def _events(self) -> AsyncGenerator[BackendEvent, None]:
        while True:
            yield await self._receive.receive()

    async def _report(self, instance: DockerInstance) -> None:
        await self._send.send(InstanceExited(instance.instance_id, instance.exited or "ended"))

    async def _attach_again(self, instance: DockerInstance) -> None:
        with contextlib.suppress(BackendUnavailable, EngineRefused):
            await instance.attach(self._nursery)

    # Recovery

    async def find(self) -> list[Found]:
        """See Backend.find."""
        return await self._census.find()

    async def adopt(self, found: Found, revision: Revision, on_output: OnOutput) -> Running:
        """See Backend.adopt."""
        name = container_name(self.daemon_id, revision.spec.name, found.instance_id)
        instance = DockerInstance(self._engine, found.instance_id, name, on_output)
        try:
            instance.container_id = self._census.container_of(found)
            info, place = await self._engine.call(lambda client: _look(client, instance.container_id))
            instance.learn(info, place)
            if instance.exited is not None:
                raise StartError(f"{name} has ended: {instance.exited}")
            self._census.add(instance)
            await instance.thaw()
            await instance.attach(self._nursery)
        except BaseException as exc:
            self._census.drop(instance)
            if instance.container_id:
                self._census.hold(found.instance_id, instance.container_id)
            await instance.let_go()
            if isinstance(exc, (docker.errors.APIError, EngineRefused, OSError)):
                raise StartError(f"{name} cannot be taken over: {exc}") from exc
            raise
        instance.ready = True
        return instance

    async def remove(self, found: Found) -> None:
        """See Backend.remove. One that was adopted meanwhile is stopped."""
        await self._census.remove(found)

    async def reconcile(self) -> int:
        """Remove containers of this daemon's that nobody knows, as a create that came back too late leaves them;
        and what code volumes are not used any more. Returns how many containers. Raises BackendUnavailable."""
        try:
            await self._code.tidy()
            return await self._census.remove_strays()
        except docker.errors.APIError as exc:
            raise BackendUnavailable(f"the engine refused a question: {exc.explanation}") from exc

    async def _reconcile_for_ever(self) -> None:
        while True:
            await trio.sleep(RECONCILE_EVERY_S)
            if not self._feed.lost:
                try:
                    await self.reconcile()
                except BackendUnavailable:
                    self._feed.doubt()
                except Exception:  # what it could not remove stays for the next time; the daemon goes on
                    log.exception("looking for strays failed unexpectedly")


def _create(client: Any, config: dict[str, Any], name: str) -> str:
    return str(client.create_container_from_config(config, name)["Id"])


def _start(client: Any, container_id: str) -> tuple[dict[str, Any], Place]:
    client.start(container_id)
    return _look(client, container_id)


def _look(client: Any, container_id: str) -> tuple[dict[str, Any], Place]:
    info: dict[str, Any] = client.inspect_container(container_id)
    return info, Place.of(info)


def _of_image(image: Image) -> Artifact:
    return Artifact(
        digest=image.id,
        image=image.id,
        entrypoint=image.entrypoint,
        command=image.command,
        user=image.user,
        size_mb=image.size_mb,
    )


def _check_limits(spec: FunctionSpec) -> None:
    if spec.memory_mb < MIN_MEMORY_MB:
        raise ArtifactError(
            f"{spec.name}: memory_mb is {spec.memory_mb}, and the engine allows no less than {MIN_MEMORY_MB}",
            hint=f"set memory_mb to {MIN_MEMORY_MB} or more",
        )


def _check_capabilities(spec: FunctionSpec, artifact: Artifact) -> None:
    """Capabilities are given to root only: for another user, with no-new-privileges, they would change nothing."""
    user = effective_user(spec, artifact)
    if spec.security.cap_add and user and not is_root(user):
        raise ArtifactError(
            f"{spec.name}: security.cap_add does nothing for user {user}",
            hint="set security.allow_root (for an image that runs as root) or security.user: '0', or drop cap_add",
        )
