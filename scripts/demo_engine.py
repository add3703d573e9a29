"""The Docker engine as the demo uses it: is there one, the images it needs, and a plain start to compare with."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import docker
import docker.errors
import requests

from scripts.demo_daemon import DemoError

LABEL_DAEMON = "io.poold.daemon"
LABEL_INSTANCE = "io.poold.instance"
LABEL_DEMO = "io.poold.demo"
DEFAULT_SOCKET = "unix:///var/run/docker.sock"
PLAIN_TIMEOUT_S = 60.0
POLL_S = 0.002
COPIED = ("Image", "Cmd", "Entrypoint", "Env", "User", "WorkingDir")


def find_engine(wanted: str) -> tuple[DemoEngine | None, str]:
    """The engine to use, or None for the process backend; and for people, which and why. Raises DemoError."""
    if wanted == "process":
        return None, "the process backend was asked for: no Docker engine is looked for"
    address = os.environ.get("DOCKER_HOST") or DEFAULT_SOCKET
    named = "DOCKER_HOST" if os.environ.get("DOCKER_HOST") else "DOCKER_HOST is not set; the default socket"
    try:
        client = docker.DockerClient.from_env(timeout=60)
        version = client.version()["Version"]
    except (docker.errors.DockerException, requests.RequestException, OSError) as exc:
        tried = f"no Docker engine answers (tried {address}: {named}; {_reason(exc)})"
        if wanted == "docker":
            raise DemoError(f"{tried}; start one, or point DOCKER_HOST to one") from exc
        return None, f"{tried}: the demo runs on sandboxed processes"
    return DemoEngine(client), f"a Docker engine answers at {address} (version {version}): the demo runs on containers"


def _reason(exc: Exception) -> str:
    """The innermost cause, which says it best."""
    found: BaseException = exc
    while (inner := found.__cause__ or found.__context__) is not None:
        found = inner
    return (getattr(found, "strerror", None) or str(found) or type(found).__name__).lower()


class DemoEngine:
    """`with engine:` removes at the end whatever the demo and its poold made on it and did not remove."""

    def __init__(self, client: docker.DockerClient) -> None:
        self._client = client
        self._mark = uuid.uuid4().hex[:12]
        self._daemon_id = ""
        self._images_before: set[str] = set()

    def __enter__(self) -> DemoEngine:
        self._images_before = self._images()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = [LABEL_DEMO + "=" + self._mark]
        if self._daemon_id:
            found.append(f"{LABEL_DAEMON}={self._daemon_id}")
        for label in found:
            for container in self._client.containers.list(all=True, filters={"label": label}):
                with contextlib.suppress(docker.errors.NotFound):
                    container.remove(force=True, v=True)
            for network in self._client.networks.list(filters={"label": label}):
                network.remove()
            for volume in self._client.volumes.list(filters={"label": label}):
                volume.remove()
        for image in self._images() - self._images_before:
            with contextlib.suppress(docker.errors.APIError):  # another poold began to use it meanwhile
                self._client.images.remove(image)
        self._client.close()

    def _images(self) -> set[str]:
        """Images that a demo may have made: the example's, and poold's empty one."""
        images = self._client.images.list(filters={"label": LABEL_DEMO})
        images += self._client.images.list(filters={"label": "io.poold.userland"})
        return {str(image.id) for image in images}

    def build(self, example: Path, directory: Path, tag: str) -> str:
        """Build an example's image in `directory`, unless it is there. Returns why it cannot be built here, or "".

        Raises DemoError with the build's last lines.
        """
        with contextlib.suppress(docker.errors.ImageNotFound):
            self._client.images.get(tag)
            return ""
        home = shutil.copytree(example, directory / example.name)  # what build.sh makes is not to stay
        made = subprocess.run([home / "build.sh", "--context"], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            return made.stderr.strip().rpartition("\n")[2]
        self._build(home, tag)
        return ""

    def _build(self, home: Path, tag: str) -> None:
        try:
            self._client.images.build(path=str(home), tag=tag, rm=True, forcerm=True, labels={LABEL_DEMO: "1"})
        except docker.errors.BuildError as exc:
            lines = [str(line.get("stream") or line.get("error") or "").rstrip() for line in exc.build_log]
            raise DemoError(f"building {tag} failed:\n" + "\n".join([line for line in lines if line][-10:])) from exc

    def plain_start_s(self, instance: dict[str, Any], port: int, path: str) -> float:
        """Create + start + first answer of a new container like the instance's, without poold, in seconds."""
        config = self._config_like(instance)
        started_s = time.perf_counter()
        made = self._create(config)
        try:
            self._client.api.start(made)
            networks = self._client.api.inspect_container(made)["NetworkSettings"]["Networks"]
            address = next(network["IPAddress"] for network in networks.values())
            _first_answer(address, port, path)
            return time.perf_counter() - started_s
        finally:
            self._client.api.remove_container(made, force=True, v=True)

    def _create(self, config: dict[str, Any]) -> str:
        api: Any = self._client.api  # types-docker leaves this method untyped
        return str(api.create_container_from_config(config)["Id"])

    def _config_like(self, instance: dict[str, Any]) -> dict[str, Any]:
        """What poold made the container of an instance of."""
        found = self._client.containers.list(filters={"label": f"{LABEL_INSTANCE}={instance['id']}"})
        # Another poold on this engine may have an instance of the same number; the process id is the engine's own.
        found = [each for each in found if each.attrs["State"]["Pid"] == instance["pid"]]
        if not found:
            raise DemoError(f"there is no container of instance {instance['id']} to make an equal one of")
        shown = found[0].attrs
        self._daemon_id = shown["Config"]["Labels"][LABEL_DAEMON]
        config = {key: shown["Config"][key] for key in COPIED}
        config["Labels"] = {LABEL_DEMO: self._mark}
        config["HostConfig"] = {**shown["HostConfig"], "NetworkMode": "bridge"}
        return config


def _first_answer(address: str, port: int, path: str) -> None:
    """Ask until the code inside listens and answers. Raises DemoError."""
    request = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode()
    deadline_s = time.monotonic() + PLAIN_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5) as sock:
            sock.sendall(request)
            if sock.recv(65536).startswith(b"HTTP/1.1 "):
                return
        time.sleep(POLL_S)
    raise DemoError(f"a plain container did not answer at {address}:{port} in {PLAIN_TIMEOUT_S:.0f} s")
