"""One running container: reaching into it, freezing it, measuring it, ending it."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import docker.errors
import trio

from pool import cgroups, netns
from pool.backends.base import OnOutput, Usage
from pool.backends.docker_client import EngineClient
from pool.backends.docker_logs import attach, pump
from pool.backends.docker_stream import EngineStream
from pool.channel import Channel, SocketChannel
from pool.errors import BackendUnavailable, ChannelClosed
from pool.freezer import CgroupFreezer
from pool.instance_cgroup import InstanceCgroup, Parents

DIAL_TIMEOUT_S = 5.0
END_TOLD_S = 2.0  # how long the engine may take to tell of a container's end
LAST_OUTPUT_S = 2.0  # how long what a container printed last may take to arrive after its end
REMOVE_TRIES = 8
REMOVE_FIRST_WAIT_S = 0.05  # doubles; 6 s in all
NO_WAY_IN = (
    "give poold CAP_SYS_ADMIN and CAP_SYS_PTRACE (run it as root, or with the poold.service it comes with), "
    "or deploy the function with network: bridge"
)
FAR_AWAY = (
    "poold opens no ports: run it on the engine's host, or give the function a docker network "
    "whose addresses this host can reach (macvlan, ipvlan, a routed bridge)"
)
_EXIT_WORDS = {126: "exit code 126 (its command cannot be executed)", 127: "exit code 127 (its command was not found)"}


def exit_text(code: int, out_of_memory: bool) -> str:
    """How a container ended, for people. Codes above 128 are a signal's, as shells and inits report them."""
    if out_of_memory:
        return "out of memory"
    if 128 < code <= 128 + signal.NSIG:
        try:
            return f"killed by signal {code - 128} ({signal.Signals(code - 128).name})"
        except ValueError:
            return f"killed by signal {code - 128}"
    return _EXIT_WORDS.get(code, f"exit code {code}")


async def remove_container(engine: EngineClient, reference: str) -> None:
    """Remove it, running or not, with its anonymous volumes; gone already is fine. Thaw it before.

    Returns when it is gone. Raises BackendUnavailable when the engine cannot be asked or does not manage.
    """
    wait_s, reason = REMOVE_FIRST_WAIT_S, ""
    for _ in range(REMOVE_TRIES):
        try:
            await engine.call(lambda client: client.remove_container(reference, v=True, force=True))
            return
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as exc:
            # 409: somebody else is removing it; 500: a mount is busy for a moment, or its end was not seen yet.
            reason = str(exc.explanation or exc)
        await trio.sleep(wait_s)
        wait_s *= 2
    raise BackendUnavailable(f"the engine cannot remove the container {reference}: {reason}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a container's first process is, as far as this host can tell."""

    is_here: bool
    freezer: CgroupFreezer | None = None
    cgroup: InstanceCgroup | None = None

    @classmethod
    def of(cls, info: dict[str, Any]) -> Place:
        """By an inspect. Reads /proc: for a thread."""
        pid = int(info["State"].get("Pid") or 0)
        if not pid or not _is_here(pid, str(info["Id"])):
            return cls(False)
        return cls(True, CgroupFreezer.for_pid(pid), _cgroup_of(pid))


class DockerInstance:
    """A container of this daemon's; Running in terms of the protocol."""

    def __init__(self, engine: EngineClient, instance_id: str, name: str, on_output: OnOutput) -> None:
        self.instance_id = instance_id
        self.name = name
        self.container_id = ""
        self.pid: int | None = None
        self.exited: str | None = None
        self.ended = trio.Event()
        self.ready = False  # its start has come to its end: its exit is news
        self.stopping = False
        self.out_of_memory = False  # the engine said so
        self.attached = False
        self.forget: Callable[[], None] = lambda: None
        self._engine = engine
        self._on_output = on_output
        self._stop_lock = trio.Lock()
        self._output_done = trio.Event()
        self._output_scope = trio.CancelScope()
        self._namespace: netns.NetNamespace | None = None
        self._freezer: CgroupFreezer | None = None
        self._cgroup: InstanceCgroup | None = None
        self._address = ""
        self._network = ""
        self._local = False
        self._pause_works = True
        self._paused = False
        self._stop_signal = "SIGTERM"

    # Coming to be

    def learn(self, info: dict[str, Any], place: Place) -> None:
        """Take in an inspect of the running container, and where its process is."""
        state = info["State"]
        self._paused = bool(state.get("Paused"))
        self._stop_signal = str(info["Config"].get("StopSignal") or "SIGTERM")
        self._network = str(info["HostConfig"].get("NetworkMode", ""))
        networks = (info.get("NetworkSettings") or {}).get("Networks") or {}
        self._address = next((str(n["IPAddress"]) for n in networks.values() if n.get("IPAddress")), "")
        if not state.get("Running"):
            self.note_exit(exit_text(int(state.get("ExitCode", 0)), bool(state.get("OOMKilled")) or self.out_of_memory))
            return
        self.pid = int(state["Pid"])
        self._local, self._freezer, self._cgroup = place.is_here, place.freezer, place.cgroup
        if place.is_here and netns.can_enter():
            # The process may end at any moment; the event stream then says so.
            with contextlib.suppress(BackendUnavailable):
                self._namespace = netns.NetNamespace.open(self.pid)

    async def attach(self, nursery: trio.Nursery) -> None:
        """Begin to read what it prints. Raises BackendUnavailable, EngineRefused."""
        stream = await attach(self._engine, self.container_id)
        self.attached = True
        self._output_done = trio.Event()
        self._output_scope = trio.CancelScope()
        nursery.start_soon(self._read_output, stream)

    async def _read_output(self, stream: EngineStream) -> None:
        try:
            with self._output_scope:
                await pump(stream, self._on_output)
        finally:
            self.attached = False
            self._output_done.set()

    def note_exit(self, detail: str) -> bool:
        """Its process has ended. True when that was not known."""
        if self.exited is not None:
            return False
        self.exited = detail
        self.ended.set()
        return True

    # Running

    @property
    def can_freeze(self) -> bool:
        """By its cgroup, else by the engine's pause as long as that has worked."""
        return self._freezer is not None or self._pause_works

    @property
    def reached_by(self) -> str:
        """For `describe`: how dial() gets there."""
        return "network namespace" if self._namespace else "address"

    async def dial(self, port: int) -> Channel:
        """See Running.dial."""
        if self._namespace is not None:
            return await self._namespace.dial("127.0.0.1", port, DIAL_TIMEOUT_S)
        if not self._address and self.exited is None:
            # Code that ends within moments can be gone before its namespace was opened, and before that is told.
            with trio.move_on_after(END_TOLD_S):
                await self.ended.wait()
        if self.exited is not None:
            raise ChannelClosed(f"the instance has ended: {self.exited}")
        if not self._address:
            raise BackendUnavailable(
                f"{self.name} has no address (network: {self._network}), and its network namespace cannot be entered",
                hint=NO_WAY_IN if self._local else FAR_AWAY,
            )
        return await self._dial_address(port)

    async def _dial_address(self, port: int) -> Channel:
        hint = NO_WAY_IN if self._local else FAR_AWAY
        try:
            sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        except OSError as exc:
            hint = "raise LimitNOFILE (ulimit -n) of poold"
            raise BackendUnavailable(f"no socket can be made: {exc.strerror}", hint=hint) from exc
        try:
            with trio.move_on_after(DIAL_TIMEOUT_S) as limit:
                await sock.connect((self._address, port))
            if limit.cancelled_caught:
                raise BackendUnavailable(f"{self.name} at {self._address} does not answer at all", hint=hint)
            return SocketChannel(socket.socket(fileno=sock.detach()))
        except ConnectionRefusedError as exc:
            raise ChannelClosed(f"nothing listens on {self._address}:{port}") from exc
        except OSError as exc:
            raise BackendUnavailable(f"{self.name} at {self._address}: {exc.strerror or exc}", hint=hint) from exc
        finally:
            sock.close()

    async def listen(self, port: int) -> trio.SocketListener:
        """See Running.listen."""
        if self._namespace is None:
            raise BackendUnavailable(
                f"nothing can listen inside {self.name}: its network namespace cannot be entered",
                hint=NO_WAY_IN if self._local else "run poold on the engine's host",
            )
        return await self._namespace.listen("127.0.0.1", port)

    async def freeze(self) -> None:
        """See Running.freeze."""
        if self._freezer is not None:
            self._freezer.freeze()
            await self._freezer.settle()
            return
        self._paused = True  # also where no answer comes: it may have been done, and to unpause in vain is no error
        try:
            await self._engine.call(lambda client: client.pause(self.container_id))
        except docker.errors.APIError as exc:
            self._paused = self._pause_works = False
            raise BackendUnavailable(f"the engine cannot pause {self.name}: {exc.explanation}") from exc

    async def thaw(self) -> None:
        """See Running.thaw: one write to a kernel file, or the engine's unpause."""
        if self._freezer is not None:
            self._freezer.thaw()
        if self._paused:
            await self._unpause()

    async def _unpause(self) -> None:
        try:
            await self._engine.call(lambda client: client.unpause(self.container_id))
        except docker.errors.APIError as exc:
            if exc.status_code not in (404, 409, 500):  # gone, or not paused any more: the latter is a 500
                raise BackendUnavailable(f"the engine cannot unpause {self.name}: {exc.explanation}") from exc
        self._paused = False

    async def sample(self) -> Usage:
        """See Running.sample. From the cgroup's files (kernel memory: no thread), else the engine's statistics."""
        if self._cgroup is not None:
            with contextlib.suppress(OSError):
                memory_mb, cpu_s = self._cgroup.memory_mb(), self._cgroup.cpu_s()
                if memory_mb is not None and cpu_s is not None:
                    return Usage(memory_mb, cpu_s)
        try:
            answer: Any = await self._engine.query(
                lambda client: client.stats(self.container_id, stream=False, one_shot=True)
            )
        except docker.errors.APIError as exc:
            raise BackendUnavailable(f"no statistics of {self.name}: {exc.explanation}") from exc
        memory = answer.get("memory_stats") or {}
        details = memory.get("stats") or {}
        used = memory.get("usage", 0) - details.get("total_inactive_file", details.get("inactive_file", 0))
        cpu_ns = ((answer.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage", 0)
        return Usage(max(0, used) / 1_048_576, cpu_ns / 1e9)

    # Ending

    async def stop(self, grace_s: float) -> None:
        """See Running.stop."""
        self.stopping = True
        async with self._stop_lock:
            if not self.container_id:
                return
            try:
                await self.thaw_for_end()
                if grace_s > 0 and self.exited is None:
                    await self._ask_to_end(grace_s)
                await remove_container(self._engine, self.container_id)
                self.note_exit("stopped")
                self.container_id = ""
            finally:
                await self.let_go()

    async def thaw_for_end(self) -> None:
        """A frozen process does not take its signal. What cannot be thawed any more has ended."""
        with contextlib.suppress(OSError, BackendUnavailable):
            await self.thaw()

    async def _ask_to_end(self, grace_s: float) -> None:
        """The image's stop signal, then up to grace_s for the event stream to report the end."""
        try:
            await self._engine.call(lambda client: client.kill(self.container_id, signal=self._stop_signal))
        except docker.errors.APIError:
            return  # not running, or not there any more
        with trio.move_on_after(grace_s):
            await self.ended.wait()

    async def let_go(self) -> None:
        """Give back what this process holds of it: its last output is read, for a moment; then nothing is left."""
        with trio.CancelScope(shield=True):
            if self.attached:
                with trio.move_on_after(LAST_OUTPUT_S):
                    await self._output_done.wait()
                self._output_scope.cancel()
                await self._output_done.wait()
        self.release()
        self.forget()

    def release(self) -> None:
        """Close the hold on its network namespace."""
        if self._namespace is not None:
            self._namespace.close()
            self._namespace = None


def _is_here(pid: int, container_id: str) -> bool:
    """Whether the engine's pid is a process of this host's, and this container's: a remote engine has its own."""
    try:
        with open(f"/proc/{pid}/cgroup") as file:
            return container_id in file.read()
    except OSError:
        return False


def _cgroup_of(pid: int) -> InstanceCgroup | None:
    """The container's cgroup, in each hierarchy that measures or limits."""
    version, directory, names = {}, {}, set()
    try:
        member_of = cgroups.membership(pid)
        for hierarchy in sorted(cgroups.hierarchies(), key=lambda h: h.version):
            path = cgroups.path_in(hierarchy, member_of)
            where = hierarchy.directory(path) if path else None
            if where is None or where == hierarchy.mount:
                continue
            found = hierarchy.controllers or frozenset({"memory", "cpuacct"})
            names.add(where.name)
            version[where.parent] = hierarchy.version
            directory.update({name: where.parent for name in found if name not in directory})
    except OSError:
        return None
    return InstanceCgroup(Parents(version, directory), names.pop()) if len(names) == 1 else None
