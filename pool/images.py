"""Images: found on the engine, else pulled with the registry's credentials; pinned by their id.

Pulls are streams of the engine's that go on for minutes. They are read in trio, so cancelling one closes its
connection, and the engine gives it up.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker.auth
import docker.errors
import trio

from pool.backends.base import OnProgress
from pool.backends.docker_client import EngineClient
from pool.backends.docker_stream import EngineRefused, open_stream
from pool.errors import ArtifactError, BackendUnavailable

PROGRESS_EVERY_S = 0.3
PULL_SILENCE_S = 300.0  # an engine that says nothing for so long is waiting for a registry that went away
MIB = 1_048_576
RegistryAuth = dict[str, dict[str, str]] | str | Path | None


@dataclass(frozen=True, slots=True)
class Image:
    """What an image's name stood for when it was looked up."""

    id: str  # sha256:..., what is started
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    user: str
    size_mb: int


class Credentials:
    """User names and passwords of registries. Read again for each pull, for they are often temporary.

    `source`: a Docker config.json (also its credential stores work), or {registry host: {"username", "password"}},
    or None for Docker's own places ($DOCKER_CONFIG, ~/.docker/config.json).
    """

    def __init__(self, source: RegistryAuth) -> None:
        self._source = source

    def header(self, image: str) -> str | None:
        """The X-Registry-Auth for pulling `image`; None without credentials. For a thread: reads files, may run a
        credential store. Raises ArtifactError."""
        try:
            registry, _ = docker.auth.resolve_repository_name(image)
            if isinstance(self._source, dict):
                found: Any = docker.auth.AuthConfig({"auths": dict(self._source)}).resolve_authconfig(registry)
            else:
                path = str(self._source) if self._source is not None else None
                if path is not None and not Path(path).is_file():
                    raise ArtifactError(f"there is no file {path} with registry credentials")
                found = docker.auth.load_config(config_path=path).resolve_authconfig(registry)
        except (docker.errors.DockerException, OSError, ValueError) as exc:
            raise ArtifactError(f"the registry credentials cannot be read: {exc}") from exc
        return docker.auth.encode_header(found).decode() if found else None


class Progress:
    """A pull's many lines, put together to one: layers done, megabytes of those that say their size. Pure."""

    def __init__(self, image: str) -> None:
        self._image = image
        self._layers: dict[str, bool] = {}  # done?
        self._bytes: dict[str, tuple[int, int]] = {}

    def take(self, document: dict[str, Any]) -> None:
        """One of the engine's progress documents."""
        layer, status = str(document.get("id", "")), str(document.get("status", ""))
        if not layer or status.startswith("Pulling from"):
            return
        self._layers[layer] = self._layers.get(layer, False) or status in ("Pull complete", "Already exists")
        detail = document.get("progressDetail") or {}
        if status == "Downloading" and detail.get("total"):
            self._bytes[layer] = (int(detail.get("current", 0)), int(detail["total"]))
        elif status in ("Download complete", "Pull complete") and layer in self._bytes:
            self._bytes[layer] = (self._bytes[layer][1], self._bytes[layer][1])

    def line(self) -> str:
        """For people."""
        done = sum(self._layers.values())
        text = f"pulling {self._image}: {done} of {len(self._layers)} layers"
        if self._bytes:
            current, total = (sum(column) / MIB for column in zip(*self._bytes.values(), strict=True))
            text += f", {current:.1f} of {total:.1f} MB"
        return text


class Images:
    """Looks images up on one engine."""

    def __init__(self, engine: EngineClient, registry_auth: RegistryAuth = None) -> None:
        self._engine = engine
        self._credentials = Credentials(registry_auth)

    async def find(self, name: str) -> Image | None:
        """The image as the engine has it; None when it has none. Raises ArtifactError for a name that is none."""
        try:
            return _image(await self._engine.query(lambda client: _inspect(client, name)))
        except docker.errors.NotFound:
            return None
        except docker.errors.APIError as exc:
            raise ArtifactError(
                f"{name!r} is not an image's name: {exc.explanation}", hint="it is REPOSITORY[:TAG], in lower case"
            ) from exc

    async def resolve(self, name: str, on_progress: OnProgress) -> Image:
        """Find it, or pull it. Raises ArtifactError, BackendUnavailable."""
        found = await self.find(name)
        if found is not None:
            return found
        if name.startswith("sha256:"):
            raise ArtifactError(f"the engine has no image {name}", hint="an image id cannot be pulled; use a name")
        await self.pull(name, on_progress)
        found = await self.find(name)
        if found is None:
            raise ArtifactError(f"{name} was pulled, and removed again by somebody", hint="deploy again")
        return found

    async def pull(self, name: str, on_progress: OnProgress) -> None:
        """Pull it, with at most a few lines of progress a second. Raises ArtifactError, BackendUnavailable."""
        repository, tag = split_name(name)
        header = await trio.to_thread.run_sync(self._credentials.header, name, abandon_on_cancel=True)
        headers = {"X-Registry-Auth": header} if header else {}
        on_progress(f"pulling {name}" + (" with credentials" if header else ""))
        try:
            query = {"fromImage": repository, "tag": tag}
            with trio.fail_after(PULL_SILENCE_S) as silence:
                stream = await open_stream(self._engine, "POST", "/images/create", query, headers, PULL_SILENCE_S)
                async with contextlib.aclosing(stream), contextlib.aclosing(stream.documents()) as documents:
                    await self._follow(name, documents, on_progress, silence)
        except EngineRefused as exc:
            raise pull_error(name, exc.message, bool(header)) from exc
        except trio.TooSlowError as exc:
            raise ArtifactError(
                f"pulling {name} came to a standstill", hint="see whether its registry can be reached from the engine"
            ) from exc

    async def _follow(self, name: str, documents: Any, on_progress: OnProgress, silence: trio.CancelScope) -> None:
        progress, shown_s, ended_well = Progress(name), trio.current_time(), False
        async for document in documents:
            silence.deadline = trio.current_time() + PULL_SILENCE_S
            if "error" in document:
                raise EngineRefused(500, str(document["error"]))
            progress.take(document)
            ended_well = str(document.get("status", "")).startswith("Status:")
            if trio.current_time() - shown_s >= PROGRESS_EVERY_S or ended_well:
                shown_s = trio.current_time()
                on_progress(f"pulled {name}" if ended_well else progress.line())
        if not ended_well:
            raise BackendUnavailable(f"the engine went away while it pulled {name}", hint="deploy again")


def split_name(name: str) -> tuple[str, str]:
    """Repository and tag (or digest), with Docker's default of "latest"."""
    if "@" in name:
        repository, _, digest = name.partition("@")
        return repository, digest
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        return name, "latest"
    return repository, tag


def pull_error(name: str, message: str, with_credentials: bool) -> ArtifactError:
    """Why an image could not be pulled, and what to do about it."""
    text = message.lower()
    build = f"build it on the engine's host (docker build -t {name} .)"
    if any(sign in text for sign in ("unauthorized", "access denied", "forbidden", "no basic auth", "authentication")):
        told = (
            "the credentials poold has for it were refused" if with_credentials else "poold has no credentials for it"
        )
        return ArtifactError(
            f"no permission to pull {name}, or it does not exist; {told}",
            hint=f"check the name; docker login to its registry, or set registry_auth; or {build}",
        )
    if any(sign in text for sign in ("manifest unknown", "not found", "does not exist", "name unknown")):
        return ArtifactError(f"there is no image {name}", hint=f"check its name and tag; or {build}")
    if any(sign in text for sign in ("no such host", "refused", "timeout", "deadline", "unreachable", "lookup", "eof")):
        return ArtifactError(
            f"the engine has no image {name} and cannot reach its registry ({message})",
            hint=f"{build}, or docker load it there, or connect the engine to the registry and docker pull {name}",
        )
    return ArtifactError(f"pulling {name} failed: {message}", hint=f"try docker pull {name}; or {build}")


def _inspect(client: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = client.inspect_image(name)
    return found


def _image(info: dict[str, Any]) -> Image:
    config = info.get("Config") or {}
    return Image(
        id=str(info["Id"]),
        entrypoint=tuple(config.get("Entrypoint") or ()),
        command=tuple(config.get("Cmd") or ()),
        user=str(config.get("User") or ""),
        size_mb=int(info.get("Size", 0)) // MIB,
    )
