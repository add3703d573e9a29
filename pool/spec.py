"""What a user asks for when deploying a function, as data. Reading it from YAML or JSON is the gateway's."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Port = Annotated[int, Meta(ge=1, le=65535)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
AbsolutePath = Annotated[str, Meta(pattern=r"^/")]


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class PoolSpec(_Spec, frozen=True):
    """How many instances, and for how long."""

    min: Annotated[int, Meta(ge=0, le=1000)] = 0  # kept started, whatever happens
    max: Annotated[int, Meta(ge=1, le=1000)] = 10
    keepalive: str = "ttl"  # a policy's name
    keepalive_s: Positive = 600.0
    freeze_after_s: NotNegative | None = 1.0  # idle this long, then frozen; null: never
    max_age_s: Positive | None = None
    max_uses: Annotated[int, Meta(ge=1)] | None = None
    max_memory_mb: Annotated[int, Meta(ge=4)] | None = None


class QueueSpec(_Spec, frozen=True):
    """Invocations that wait for a slot."""

    max: Annotated[int, Meta(ge=0, le=100_000)] = 100
    timeout_s: Positive = 30.0


class HookSpec(_Spec, frozen=True):
    """One of Alibaba FC's life-cycle hooks."""

    enabled: bool = True
    timeout_s: Annotated[float, Meta(gt=0, le=300)] = 3.0


class FcSpec(_Spec, frozen=True):
    """What only the fc contract uses (see shared contract: Alibaba Function Compute, custom runtime)."""

    type: Literal["event", "http"] = "event"
    handler: str = "index.handler"
    initializer: HookSpec | None = None
    pre_freeze: HookSpec | None = None
    pre_stop: HookSpec | None = None
    service: str = ""
    qualifier: str = "LATEST"
    region: str = ""
    account_id: str = ""


class WebSpec(_Spec, frozen=True):
    """What only the web contract uses."""

    invoke_path: AbsolutePath = "/"  # where `invoke` (not the pass-through) POSTs its body
    ready_path: AbsolutePath | None = None  # a GET answered below 500 means ready; null: an open port does


class MountSpec(_Spec, frozen=True):
    """A host path inside the instance."""

    source: AbsolutePath
    target: AbsolutePath
    read_only: bool = True


class SecuritySpec(_Spec, frozen=True):
    """Where a function departs from the hardened defaults."""

    user: str | None = None  # uid[:gid]; null: 65534, or the image's own user when that is not root
    allow_root: bool = False  # lets an image that asks for root (or names no user) run as root
    read_only: bool = True  # the root file system
    tmpfs_mb: Annotated[int, Meta(ge=1, le=65536)] = 64  # /tmp
    cap_add: tuple[str, ...] = ()
    pids: Annotated[int, Meta(ge=1, le=32768)] = 256
    nofile: Annotated[int, Meta(ge=16, le=1_048_576)] = 4096
    runtime: str | None = None  # another OCI runtime the engine knows


class FunctionSpec(_Spec, frozen=True):
    """One function as its user describes it. Exactly one of image and code is the thing to run; code may name
    a base image with image."""

    name: Name
    image: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    code: Annotated[str, Meta(min_length=1)] | None = None  # a directory with an executable `bootstrap`
    contract: str = "web"
    description: str = ""
    entrypoint: tuple[str, ...] | None = None  # replaces the image's
    command: tuple[str, ...] | None = None  # the arguments; replaces the image's CMD
    port: Port | None = None  # null: the contract's default
    env: dict[str, str] = {}
    workdir: AbsolutePath | None = None
    tenant: Name = "default"
    timeout_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0  # of one invocation
    start_timeout_s: Annotated[float, Meta(gt=0, le=600)] = 120.0  # from create to prepared
    stop_grace_s: Annotated[float, Meta(ge=0, le=600)] = 2.0
    memory_mb: Annotated[int, Meta(ge=4, le=1_048_576)] = 256
    cpu: Annotated[float, Meta(gt=0, le=1024)] = 1.0
    concurrency: Annotated[int, Meta(ge=1, le=1000)] = 1  # invocations at a time in one instance
    reserved: Annotated[int, Meta(ge=0)] = 0
    network: str = "bridge"  # bridge (poold's own), none, host is refused, or the name of a docker network
    max_body_mb: Annotated[int, Meta(ge=1, le=1024)] = 32
    pool: PoolSpec = PoolSpec()
    queue: QueueSpec = QueueSpec()
    web: WebSpec = WebSpec()
    fc: FcSpec = FcSpec()
    mounts: tuple[MountSpec, ...] = ()
    security: SecuritySpec = SecuritySpec()


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """What a spec's image or code came to: immutable, so that a revision is.

    `digest` identifies the content (image id, or code digest, or both joined); `image` is what the backend starts
    from (an image id; None for code on the host's own userland); `code_path` is the unpacked code directory."""

    digest: str
    image: str | None = None
    code_path: str | None = None
    entrypoint: tuple[str, ...] = ()  # the image's own
    command: tuple[str, ...] = ()
    user: str = ""  # the image's own
    size_mb: int = 0


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """One immutable version of a function: the pool's key."""

    id: str  # name@hash
    spec: FunctionSpec
    artifact: Artifact


def make_revision(spec: FunctionSpec, artifact: Artifact) -> Revision:
    """Name a revision by what it runs and how: equal spec and content give the equal id.

    Floor and ceiling are not part of it: scaling does not make a new revision. Nor is the place the code was
    uploaded from: its content is.
    """
    fixed = msgspec.structs.replace(
        spec, pool=msgspec.structs.replace(spec.pool, min=0, max=1), description="", code=spec.code and "code"
    )
    content = msgspec.json.encode([fixed, artifact.digest], order="deterministic")
    return Revision(id=f"{spec.name}@{hashlib.sha256(content).hexdigest()[:12]}", spec=spec, artifact=artifact)
