"""What an instance's container is: its name, labels, command, limits and walls, as the engine's API wants them.

Pure: a StartRequest in, the JSON of `POST /containers/create` out (Docker Engine API 1.41).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pool.backends.base import StartRequest
from pool.code import code_command
from pool.spec import Artifact, FunctionSpec

LABEL_DAEMON = "io.poold.daemon"
LABEL_FUNCTION = "io.poold.function"
LABEL_REVISION = "io.poold.revision"
LABEL_INSTANCE = "io.poold.instance"
LABEL_RUN = "io.poold.run"  # which run of the daemon created it

NOBODY = "65534:65534"
CPU_PERIOD_US = 100_000
MIN_CPU_QUOTA_US = 1_000  # the kernel's least
MIN_MEMORY_MB = 6  # the engine's least
MIB = 1_048_576
LOG_OPTIONS = {"max-size": "8m", "max-file": "2"}  # `docker logs` works, a flood of output does not fill the disk
OOM_SCORE_ADJ = 500  # when the host runs out of memory, instances go before poold does
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_ROOT_USERS = frozenset({"", "root", "0"})


@dataclass(frozen=True, slots=True)
class Mount:
    """A bind of a host path, or with `volume` of a named volume, inside a container."""

    source: str
    target: str
    read_only: bool = True
    volume: bool = False

    def as_json(self) -> dict[str, Any]:
        """Its part of HostConfig.Mounts. Unlike -v, a source that does not exist is an error, not created."""
        kind: dict[str, Any] = {"Type": "bind", "BindOptions": {"Propagation": "rprivate"}}
        if self.volume:
            kind = {"Type": "volume", "VolumeOptions": {"NoCopy": True}}
        return {**kind, "Source": self.source, "Target": self.target, "ReadOnly": self.read_only}


def short_id(daemon_id: str) -> str:
    """The eight characters of the daemon's id that stand in names."""
    return _UNSAFE.sub("-", daemon_id)[:8]


def container_name(daemon_id: str, function: str, instance_id: str) -> str:
    """For people in `docker ps`; recovery goes by the labels."""
    return f"poold-{short_id(daemon_id)}-{function}-{_UNSAFE.sub('-', instance_id)}"


def is_root(user: str) -> bool:
    """True when an image's USER is root, by name or number, whatever its group."""
    name = user.partition(":")[0].strip()
    return name in _ROOT_USERS or (name.isdigit() and int(name) == 0)


def effective_user(spec: FunctionSpec, artifact: Artifact) -> str:
    """Who the code runs as: what the spec says, else the image's own user, else, for root, nobody.

    "" leaves it to the image: root, which the spec allowed.
    """
    if spec.security.user is not None:
        return spec.security.user
    if not is_root(artifact.user):
        return artifact.user
    if artifact.image is not None and spec.security.allow_root:
        return ""
    return NOBODY


def command_of(spec: FunctionSpec, code_target: str) -> tuple[list[str] | None, list[str] | None]:
    """Entrypoint and Cmd; None leaves the image's own. A new entrypoint without a command clears the image's
    command, as `docker run --entrypoint` does. Code runs its own command whatever its base image would start."""
    if spec.code is not None:
        whole = code_command(spec, code_target.rstrip("/"))
        return whole[:1], whole[1:]
    entrypoint = list(spec.entrypoint) if spec.entrypoint is not None else None
    command = list(spec.command) if spec.command is not None else None
    if entrypoint is not None and command is None:
        command = []
    return entrypoint, command


def code_or_image(spec: FunctionSpec) -> str:
    """What a spec runs, for people."""
    return f"the image {spec.image}" if spec.image is not None else f"the code {spec.code}"


def labels_of(request: StartRequest, daemon_id: str, run_id: str) -> dict[str, str]:
    """What recovery finds it by."""
    return {
        LABEL_DAEMON: daemon_id,
        LABEL_FUNCTION: request.revision.spec.name,
        LABEL_REVISION: request.revision.id,
        LABEL_INSTANCE: request.instance_id,
        LABEL_RUN: run_id,
    }


def container_config(
    request: StartRequest,
    *,
    image: str,
    network: str,
    labels: dict[str, str],
    mounts: list[Mount],
) -> dict[str, Any]:
    """The whole of a create request. `image` is an image id, never a tag; `network` is a docker network's name."""
    spec, artifact = request.revision.spec, request.revision.artifact
    entrypoint, command = command_of(spec, request.code_target)
    config: dict[str, Any] = {
        "Image": image,
        "Labels": labels,
        "Env": [f"{name}={value}" for name, value in request.env.items()],
        "AttachStdout": True,
        "AttachStderr": True,
        "Healthcheck": {"Test": ["NONE"]},  # the contract's readiness decides; a probe would run in frozen instances
        "HostConfig": _host_config(spec, network, [*mounts, *_spec_mounts(spec)]),
    }
    if entrypoint is not None:
        config["Entrypoint"] = entrypoint
    if command is not None:
        config["Cmd"] = command
    user = effective_user(spec, artifact)
    if user:
        config["User"] = user
    workdir = spec.workdir or (request.code_target if spec.code is not None else None)
    if workdir:
        config["WorkingDir"] = workdir
    return config


def _spec_mounts(spec: FunctionSpec) -> list[Mount]:
    return [Mount(mount.source, mount.target, mount.read_only) for mount in spec.mounts]


def _host_config(spec: FunctionSpec, network: str, mounts: list[Mount]) -> dict[str, Any]:
    security = spec.security
    memory_bytes = spec.memory_mb * MIB
    config: dict[str, Any] = {
        "NetworkMode": network,
        "ReadonlyRootfs": security.read_only,
        "CapDrop": ["ALL"],
        "CapAdd": list(security.cap_add),
        "SecurityOpt": ["no-new-privileges"],  # with it the engine's default seccomp profile stays
        "Memory": memory_bytes,
        "MemorySwap": memory_bytes,  # memory and swap together: no swap
        # A quota and not NanoCpus: the engine refuses more of those than the host has, where a limit is just no limit.
        "CpuPeriod": CPU_PERIOD_US,
        "CpuQuota": max(MIN_CPU_QUOTA_US, int(spec.cpu * CPU_PERIOD_US)),
        "PidsLimit": security.pids,
        "Ulimits": [{"Name": "nofile", "Soft": security.nofile, "Hard": security.nofile}],
        "OomScoreAdj": OOM_SCORE_ADJ,
        "Init": True,
        "IpcMode": "private",
        "LogConfig": {"Type": "json-file", "Config": LOG_OPTIONS},
        "RestartPolicy": {"Name": "no"},
        "Mounts": [mount.as_json() for mount in mounts],
    }
    if all(mount.target.rstrip("/") != "/tmp" for mount in mounts):
        # Executable, unlike Docker's own default: runtimes unpack native code there, and /code is executable anyway.
        config["Tmpfs"] = {"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={security.tmpfs_mb}m"}
    if security.runtime is not None:
        config["Runtime"] = security.runtime
    return config
