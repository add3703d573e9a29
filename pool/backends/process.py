"""The embedded backend: each instance a child process in namespaces of its own, on this host's own userland.

It needs no engine and no image. What encloses an instance (bubblewrap, unshare, nothing) is found out by trying;
`isolation` and describe() say what it came to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Literal

import structlog
import trio

from pool.backends import sandbox
from pool.backends.base import BackendEvent, Found, InstanceExited, OnOutput, OnProgress, Running, StartRequest
from pool.backends.process_running import ProcessRunning, Spawned
from pool.backends.sandbox import Kind
from pool.code import check_code, code_command, code_facts
from pool.errors import ArtifactError, BackendUnavailable, PoolError, StartError
from pool.instance_cgroup import InstanceCgroup, Limits, Parents
from pool.netns import can_enter
from pool.spawn import SpawnThread
from pool.spec import Artifact, FunctionSpec, Revision

log = structlog.get_logger("poold.process")

Asked = Literal["auto", "bwrap", "unshare", "plain"]
TRIAL_TIMEOUT_S = 10.0
KINDS: tuple[Kind, ...] = ("bwrap", "unshare", "plain")
DEFAULT_ID = 65534


class ProcessBackend:
    """See pool.backends.base.Backend. Instances end with the daemon, so none is ever found or adopted."""

    name = "process"

    def __init__(
        self,
        daemon_id: str,
        state_dir: Path,
        *,
        sandbox: Asked = "auto",
    ) -> None:
        """`state_dir`: stands in for a code directory when the sandboxes are tried. `sandbox`: "auto" takes the
        strongest that works here."""
        self._prefix = f"poold:{daemon_id}:"
        self._state_dir = state_dir
        self._asked = sandbox
        self._root = os.geteuid() == 0
        self._privileged = can_enter()
        self._refusals: dict[str, str] = {}  # kinds that were tried and do not work here, and why
        self._parents = Parents({}, {})
        self._running: dict[str, ProcessRunning] = {}
        self._exits: dict[str, str] = {}  # not told yet; an instance leaves it when it is removed
        self._exit_added = trio.Event()
        self._readers = trio.CapacityLimiter(2)  # threads that read code directories
        self._kind: Kind = "plain"
        self._spawn: SpawnThread | None = None

    @property
    def isolation(self) -> str:
        return sandbox.ISOLATION[self._kind]

    async def __aenter__(self) -> ProcessBackend:
        self._parents = await trio.to_thread.run_sync(Parents.find)
        self._spawn = SpawnThread()
        try:
            self._kind = await self._choose(self._spawn)
            await self._remove_leftovers()
        except BaseException:
            self._spawn.end()
            raise
        if self._kind == "plain":
            log.warning(self.isolation, **self._refusals)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Unlike an engine's, these instances cannot outlive the backend: what still runs is ended."""
        try:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    for running in list(self._running.values()):
                        nursery.start_soon(_stop_at_once, running)
        finally:
            if self._spawn is not None:
                self._spawn.end()

    async def describe(self) -> dict[str, str]:
        """See Backend.describe."""
        limits = sorted({"memory", "pids", "cpu"} & self._parents.directory.keys())
        lacking = sorted({"memory", "pids", "cpu"} - self._parents.directory.keys())
        versions = " and ".join(f"v{version}" for version in sorted(set(self._parents.version.values())))
        facts = {
            "sandbox": self._kind,
            "isolation": self.isolation,
            "user": "65534, or the spec's" if self._root else "65534 inside, the daemon's own outside",
            "limits": (f"{', '.join(limits)} by cgroup {versions}" if limits else "none")
            + (f"; not limited here: {', '.join(lacking)} (no writable cgroup)" if lacking else ""),
            "freezing": "by cgroup" if "freezer" in self._parents.directory else "no (no writable cgroup)",
        }
        if self._kind == "plain" and not self._root:
            facts["user"] = "the daemon's own"
        facts.update({f"no {kind}": reason for kind, reason in self._refusals.items()})
        return facts

    async def resolve(self, spec: FunctionSpec, code_path: str | None, on_progress: OnProgress) -> Artifact:
        """See Backend.resolve."""
        if spec.image is not None:
            raise ArtifactError(
                f"{spec.name}: the image {spec.image} needs Docker, and this poold runs functions as processes",
                hint='start a Docker engine and set backend = "docker", or name a code directory instead of an image',
            )
        if code_path is None:
            raise ArtifactError(f"{spec.name}: no code to run", hint="name a directory with a bootstrap in `code`")
        _check_spec(spec)
        uid, _ = _user(spec)
        as_other = self._root and uid != 0

        def read() -> Artifact:
            check_code(spec, code_path, as_other=as_other)
            facts = code_facts(code_path)
            return Artifact(digest=facts.digest, code_path=code_path, size_mb=facts.size_mb)

        return await trio.to_thread.run_sync(read, limiter=self._readers)

    async def start(self, request: StartRequest) -> Running:
        """See Backend.start."""
        if self._spawn is None:
            raise BackendUnavailable("the process backend is not open")
        ports = {request.port: _free_port()} if self._kind == "plain" else {}
        plan = self._plan(request, ports)
        limits = Limits(
            memory_mb=request.revision.spec.memory_mb,
            pids=request.revision.spec.security.pids,
            cpu=request.revision.spec.cpu,
        )
        try:
            spawned = await self._spawn.call(lambda: self._spawn_one(request, plan, limits))
        except (OSError, ValueError) as exc:
            raise StartError(f"the instance's process could not be started: {exc}", backend_fault=True) from exc
        running = ProcessRunning(
            request.instance_id,
            spawned,
            enclosed=self._kind != "plain",
            ports=ports,
            privileged=self._privileged,
            on_output=request.on_output,
            on_exit=self._exited,
            on_removed=self._removed,
        )
        self._running[request.instance_id] = running
        try:
            await running.reach_code()
        except BaseException:
            with trio.CancelScope(shield=True):
                await _stop_at_once(running)
            raise
        return running

    async def events(self) -> AsyncGenerator[BackendEvent, None]:
        """See Backend.events. Nothing here can be lost, so only exits are told."""
        while True:
            while self._exits:
                instance_id = next(iter(self._exits))
                yield InstanceExited(instance_id, self._exits.pop(instance_id))
            self._exit_added = trio.Event()
            await self._exit_added.wait()

    async def find(self) -> list[Found]:
        """Nothing: instances end with their daemon. Removes the cgroups that a killed daemon left."""
        await self._remove_leftovers()
        return []

    async def adopt(self, found: Found, revision: Revision, on_output: OnOutput) -> Running:
        """Never works: see find()."""
        raise StartError(f"{found.instance_id}: a process of an earlier daemon cannot be taken over")

    async def remove(self, found: Found) -> None:
        """Remove the cgroup of an instance of an earlier daemon, and what is in it."""
        await InstanceCgroup(self._parents, self._prefix + found.instance_id).remove()

    async def cleanup(self) -> None:
        """See Backend.cleanup. Nothing outlives an instance here but what a crash left."""
        try:
            await self._remove_leftovers()
        except BackendUnavailable as exc:
            log.warning("leftovers stay", reason=exc.message)

    async def _remove_leftovers(self) -> None:
        names = await trio.to_thread.run_sync(self._parents.named, self._prefix)
        for name in names - {self._prefix + instance_id for instance_id in self._running}:
            await InstanceCgroup(self._parents, name).remove()

    def _exited(self, running: ProcessRunning) -> None:
        if running.instance_id in self._running:
            self._exits[running.instance_id] = running.exited or ""
            self._exit_added.set()

    def _removed(self, running: ProcessRunning) -> None:
        self._running.pop(running.instance_id, None)
        self._exits.pop(running.instance_id, None)

    async def _choose(self, spawn: SpawnThread) -> Kind:
        for kind in KINDS if self._asked == "auto" else (self._asked,):
            refusal = await spawn.call(functools.partial(self._try, kind))
            if refusal is None:
                return kind
            self._refusals[kind] = refusal
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in self._refusals.items())
        raise BackendUnavailable(
            f"functions cannot be started as processes here ({reasons})",
            hint="install bubblewrap and util-linux, or start a Docker engine",
        )

    def _try(self, kind: Kind) -> str | None:
        """Start a program that does nothing, enclosed as functions will be. None when that works, else why not."""
        if kind == "bwrap" and shutil.which("bwrap", path=sandbox.PATH) is None:
            return "bubblewrap is not installed"
        self._state_dir.mkdir(parents=True, exist_ok=True)
        plan = sandbox.Plan(
            command=(shutil.which("true", path=sandbox.PATH) or "true",),
            env={},
            code_path=str(self._state_dir.resolve()),
            code_target="/code",
            workdir="/",
        )
        with _config_file(kind, plan, root=self._root) as fd:
            try:
                done = subprocess.run(
                    sandbox.command(kind, plan, fd, root=self._root),
                    pass_fds=(fd,),
                    env={"PATH": sandbox.PATH},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=TRIAL_TIMEOUT_S,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as exc:
                return str(exc)
        if done.returncode == 0:
            return None
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {done.returncode}"

    def _plan(self, request: StartRequest, ports: dict[int, int]) -> sandbox.Plan:
        spec, code_path = request.revision.spec, request.revision.artifact.code_path
        if code_path is None:
            raise StartError(f"{request.revision.id} has no code directory", permanent=True)
        target, env, workdir = request.code_target, dict(request.env), spec.workdir or request.code_target
        if self._kind == "plain":
            # Nothing is mounted; instances share the host's ports, so each gets its own.
            target, workdir = f"/proc/self/fd/{sandbox.PLAIN_CODE_FD}", spec.workdir or code_path
            for old, new in ports.items():
                env.update({name: str(new) for name, value in env.items() if "PORT" in name and value == str(old)})
        else:
            env = {"HOME": "/tmp"} | env  # the only place it can write, as in a container
        uid, gid = _user(spec)
        return sandbox.Plan(
            command=tuple(code_command(spec, target)),
            env=env,
            code_path=code_path,
            code_target=target,
            workdir=workdir,
            mounts=spec.mounts,
            uid=uid,
            gid=gid,
            read_only=spec.security.read_only,
            tmpfs_mb=spec.security.tmpfs_mb,
            nofile=spec.security.nofile,
            hostname=spec.name,
        )

    def _spawn_one(self, request: StartRequest, plan: sandbox.Plan, limits: Limits) -> Spawned:
        """Make the cgroup and the process; in the spawning thread. Raises OSError, StartError, leaving nothing."""
        spec = request.revision.spec
        try:
            check_code(spec, plan.code_path, as_other=self._root and plan.uid != 0)
        except PoolError as exc:
            raise StartError(exc.message, hint=exc.hint, permanent=True) from exc
        with contextlib.ExitStack() as undo:
            cgroup = None
            if self._parents.version:
                cgroup = self._parents.create(self._prefix + request.instance_id, limits)
                undo.callback(cgroup.rmdir)
                plan = dataclasses.replace(plan, cgroup_files=tuple(cgroup.procs_files()))
            out_read, out_write = os.pipe()
            err_read, err_write = os.pipe()
            with contextlib.ExitStack() as done:
                done.callback(os.close, out_write)
                done.callback(os.close, err_write)
                undo.callback(os.close, out_read)
                undo.callback(os.close, err_read)
                fd = done.enter_context(_config_file(self._kind, plan, root=self._root))
                process = subprocess.Popen(
                    sandbox.command(self._kind, plan, fd, root=self._root),
                    pass_fds=(fd,),
                    env={"PATH": sandbox.PATH},
                    stdin=subprocess.DEVNULL,
                    stdout=out_write,
                    stderr=err_write,
                    start_new_session=True,
                )
                undo.callback(_end_at_once, process)
            pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        return Spawned(process, pidfd, out_read, err_read, cgroup)


def _end_at_once(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


async def _stop_at_once(running: ProcessRunning) -> None:
    try:
        await running.stop(0)
    except BackendUnavailable as exc:  # its cgroup is a leftover then, for find() to remove
        log.error("an instance does not end", instance=running.instance_id, reason=exc.message)


@contextlib.contextmanager
def _config_file(kind: Kind, plan: sandbox.Plan, *, root: bool) -> Iterator[int]:
    fd = os.memfd_create("poold-config", os.MFD_CLOEXEC)
    try:
        os.write(fd, sandbox.config(kind, plan, root=root))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _free_port() -> int:
    """A port of this host that nobody had a moment ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _user(spec: FunctionSpec) -> tuple[int, int]:
    """The numeric user and group an instance runs as. Raises ArtifactError."""
    if spec.security.user is None:
        return DEFAULT_ID, DEFAULT_ID
    uid, _, gid = spec.security.user.partition(":")
    if not uid.isdigit() or (gid and not gid.isdigit()):
        raise ArtifactError(
            f"{spec.name}: security.user is {spec.security.user!r}",
            hint='write numbers, as in "1000" or "1000:1000": names differ between an image and this host',
        )
    if int(uid) == 0 and not spec.security.allow_root:
        raise ArtifactError(f"{spec.name}: security.user asks for root", hint="set security.allow_root: true")
    return int(uid), int(gid or uid)


def _check_spec(spec: FunctionSpec) -> None:
    """Refuse what this backend cannot do, instead of leaving it out. Raises ArtifactError."""

    def refuse(what: str, hint: str) -> ArtifactError:
        return ArtifactError(f"{spec.name}: {what}", hint=hint)

    if spec.network == "host":
        raise refuse("network: host would give the function this host's network", "use bridge or none")
    if spec.network not in ("bridge", "none"):
        raise refuse(
            f"the network {spec.network!r} needs Docker", "use bridge or none (as processes both have only a loopback)"
        )
    if spec.security.cap_add:
        raise refuse("security.cap_add needs Docker: processes get no capability", "remove it, or use Docker")
    if spec.security.runtime:
        raise refuse("security.runtime needs Docker", "remove it, or use Docker")
    for mount in spec.mounts:
        if ".." in mount.target.split("/"):
            raise refuse(f"the mount target {mount.target} leads upwards", "write the path without ..")
        if not Path(mount.source).exists():
            raise refuse(f"the mount source {mount.source} does not exist", "make it, or correct the path")
    texts = [*spec.env, *spec.env.values(), *(spec.entrypoint or ()), *(spec.command or ()), spec.workdir or ""]
    texts += [path for mount in spec.mounts for path in (mount.source, mount.target)]
    if any("\0" in text for text in texts) or any("=" in name for name in spec.env):
        raise refuse("env, command or a path holds a NUL character, or a name in env an =", "remove it")
