"""Which backend runs here: the one asked for, or the best that works."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pool.backends.base import Backend
from pool.backends.docker import DockerBackend
from pool.backends.process import ProcessBackend
from pool.backends.simulated import SimulatedBackend
from pool.errors import BackendUnavailable

Sandbox = Literal["auto", "bwrap", "unshare", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """What the configuration says of backends."""

    kind: Literal["auto", "docker", "process", "simulated"] = "auto"
    docker_host: str = ""  # "": DOCKER_HOST, or the engine's usual socket
    docker_network: str = ""  # "": a bridge of poold's own
    docker_cert_path: str = ""  # a directory with ca.pem, cert.pem and key.pem; "": DOCKER_CERT_PATH
    registry_auth_file: str = ""  # docker's config.json
    sandbox: Sandbox = "auto"


@dataclass(frozen=True, slots=True)
class Chosen:
    """An entered backend and, for people, why it is this one."""

    backend: Backend
    reason: str


@contextlib.asynccontextmanager
async def choose(options: BackendOptions, daemon_id: str, state_dir: Path) -> AsyncIterator[Chosen]:
    """Enter the backend. With "auto": docker where an engine answers, else process.

    Raises BackendUnavailable when none works.
    """
    async with contextlib.AsyncExitStack() as stack:
        if options.kind == "simulated":
            backend: Backend = SimulatedBackend(seed=0)
            yield Chosen(await stack.enter_async_context(backend), "asked for: nothing real runs")
            return
        refused = ""
        if options.kind in ("auto", "docker"):
            backend = docker_backend(options, daemon_id, state_dir)
            try:
                await stack.enter_async_context(backend)
            except BackendUnavailable as exc:
                if options.kind == "docker":
                    raise
                refused = exc.message
            else:
                yield Chosen(backend, "asked for" if options.kind == "docker" else "a Docker engine answers")
                return
        backend = ProcessBackend(daemon_id, state_dir, sandbox=options.sandbox)
        await stack.enter_async_context(backend)
        yield Chosen(backend, f"no Docker engine: {refused}" if refused else "asked for")


def docker_backend(options: BackendOptions, daemon_id: str, state_dir: Path) -> DockerBackend:
    """The docker backend as configured, not yet entered."""
    return DockerBackend(
        daemon_id,
        state_dir,
        docker_host=options.docker_host or None,
        cert_path=options.docker_cert_path or None,
        registry_auth=options.registry_auth_file or None,
        network_name=options.docker_network or "poold",
    )
