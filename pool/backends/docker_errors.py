"""The engine's refusals to start a container, in words that say what to change."""

from __future__ import annotations

from pool.backends.base import StartRequest
from pool.backends.docker_container import code_or_image
from pool.errors import BackendUnavailable, PoolError, StartError

# (what the engine says, what it means, what to do); the first that fits. {what}: the image or the code's directory.
_PERMANENT = (
    ("no such image", "the image of {what} was removed from the engine", "deploy the function again"),
    ("unknown runtime", "the engine does not know the runtime", "set security.runtime to one of `docker info`"),
    (
        "unknown or invalid runtime",
        "the engine does not know the runtime",
        "set security.runtime to one of `docker info`",
    ),
    ("unknown capability", "a capability in security.cap_add does not exist", "use names as in capabilities(7)"),
    ("capability not supported", "a capability in security.cap_add does not exist", "use names as in capabilities(7)"),
    ("bind source path does not exist", "a host path to be mounted does not exist", "create it, or correct mounts"),
    ("duplicate mount point", "two mounts have the same target", "correct mounts"),
    ("unable to find user", "the user does not exist in {what}", "set security.user to a number"),
    ("no matching entries in passwd", "the user does not exist in {what}", "set security.user to a number"),
    ("executable file not found", "the command does not exist in {what}", "correct entrypoint or command"),
    ("no such file or directory", "the command or its interpreter does not exist in {what}", "correct entrypoint"),
    ("permission denied", "the command in {what} may not be executed", "chmod 755 it"),
    ("exec format error", "the command in {what} is for another kind of machine", "build it for this one"),
    ("minimum memory limit", "memory_mb is below what the engine allows", "give it more"),
    ("network", "the function's network cannot be used", "see docker network ls"),
)
_ENGINE = ("no space left", "cannot allocate memory", "resource temporarily unavailable", "device or resource busy")


def start_error(message: str, status: int, request: StartRequest) -> PoolError:
    """What to raise for an answer that says `message`: at most one line of it is passed on."""
    spec = request.revision.spec
    line = " ".join(message.split())[:500]
    text = line.lower()
    if any(sign in text for sign in _ENGINE):
        return StartError(f"the engine cannot start {spec.name}: {line}", hint="see docker info", backend_fault=True)
    for sign, meaning, hint in _PERMANENT:
        if sign in text:
            what = meaning.format(what=code_or_image(spec))
            return StartError(f"{spec.name}: {what} ({line})", hint=hint, permanent=True)
    if status >= 500:
        return StartError(f"the engine failed to start {spec.name}: {line}", backend_fault=True)
    if status in (400, 404, 409):
        return StartError(f"the engine refused to start {spec.name}: {line}", permanent=status == 400)
    return BackendUnavailable(f"the engine refused to start {spec.name}: {line}")
