"""One instance of the process backend: a child process in its own namespaces, its pipes, its cgroup."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog
import trio

from pool.backends import sandbox
from pool.backends.base import OnOutput, Output, Usage
from pool.channel import Channel
from pool.errors import BackendUnavailable, ChannelClosed, StartError
from pool.instance_cgroup import InstanceCgroup
from pool.netns import NetNamespace, connect

log = structlog.get_logger("poold.process")

CODE_POLL_S, CODE_POLL_MAX_S, CODE_POLL_GROWTH = 0.001, 0.008, 1.3
CODE_TIMEOUT_S = 10.0  # from the fork to the code's first instruction; some 10 ms is usual
DIAL_TIMEOUT_S = 5.0
END_TIMEOUT_S = 10.0
LAST_OUTPUT_S = 1.0  # what a process that escaped a plain sandbox may hold a pipe open after the end
HEAD_BYTES = 4096
READ_BYTES = 65_536
_OUR_PREFIXES = ("bwrap: ", "setpriv: ", "unshare: ", "poold: ", f"{sandbox.STAGE}: ", "/bin/sh: ")


@dataclass(frozen=True, slots=True)
class Spawned:
    """What the spawning thread made."""

    process: subprocess.Popen[bytes]
    pidfd: int
    stdout_fd: int
    stderr_fd: int
    cgroup: InstanceCgroup | None


class ProcessRunning:
    """See pool.backends.base.Running."""

    def __init__(
        self,
        instance_id: str,
        spawned: Spawned,
        *,
        enclosed: bool,
        ports: dict[int, int],
        privileged: bool,
        on_output: OnOutput,
        on_exit: Callable[[ProcessRunning], None],
        on_removed: Callable[[ProcessRunning], None],
    ) -> None:
        """`enclosed`: in namespaces of its own, so that its processes are grandchildren. `ports`: where to dial for
        a port, on this host's network, when not enclosed. `privileged`: any network namespace may be entered."""
        self._instance_id = instance_id
        self._process = spawned.process
        self._pidfd = spawned.pidfd
        self._cgroup = spawned.cgroup
        self._freezer = spawned.cgroup.freezer if spawned.cgroup else None
        self._enclosed = enclosed
        self._ports = ports
        self._privileged = privileged
        self._on_output = on_output
        self._on_exit = on_exit
        self._on_removed = on_removed
        self._namespace: NetNamespace | None = None
        self._init_pid: int | None = None
        self._init_fd = -1  # pidfds: a pid may be somebody else's by the time it is used
        self._code_fd = -1
        self._exited: str | None = None
        self._ended = trio.Event()
        self._head = bytearray()  # of stderr, until the code runs: why it could not
        self._streams = [trio.lowlevel.FdStream(spawned.stdout_fd), trio.lowlevel.FdStream(spawned.stderr_fd)]
        self._open_streams = len(self._streams)
        self._output_ended = trio.Event()
        self._stopping = trio.Lock()
        self._removed = False
        # System tasks: an instance must be seen to end also while everything else is being cancelled.
        trio.lowlevel.spawn_system_task(self._watch)
        for output, stream in zip(Output, self._streams, strict=True):
            trio.lowlevel.spawn_system_task(self._read, output, stream)

    @property
    def instance_id(self) -> str:
        return self._instance_id

    @property
    def can_freeze(self) -> bool:
        return self._freezer is not None

    @property
    def pid(self) -> int | None:
        return self._init_pid

    @property
    def exited(self) -> str | None:
        return self._exited

    async def reach_code(self) -> None:
        """Wait until the sandbox stands and the code's own program runs, or has already ended.

        Raises StartError when it could not be set up or executed.
        """
        deadline, wait_s = trio.current_time() + CODE_TIMEOUT_S, CODE_POLL_S
        while self._exited is None:
            if self._find_code():
                return
            if trio.current_time() > deadline:
                raise StartError(f"the sandbox did not stand after {CODE_TIMEOUT_S:g} s", backend_fault=True)
            with trio.move_on_after(wait_s):
                await self._ended.wait()
            wait_s = min(wait_s * CODE_POLL_GROWTH, CODE_POLL_MAX_S)
        with trio.move_on_after(LAST_OUTPUT_S):
            await self._output_ended.wait()
        said = self._head.decode(errors="replace").strip()
        if said.startswith(_OUR_PREFIXES) and self._process.returncode in (1, 125, 126, 127):
            line = said.splitlines()[0]
            of_the_code = line.startswith(("setpriv: ", "poold: ", f"{sandbox.STAGE}: ", "bwrap: execvp"))
            if not of_the_code or self._process.returncode == 125:
                raise StartError(f"the sandbox could not be set up: {line}", log_tail=said, backend_fault=True)
            raise StartError(
                f"the code cannot be executed: {line}",
                hint="check that the bootstrap's first line (#!) names a program that this host has under /usr",
                log_tail=said,
                permanent=True,
            )

    def _find_code(self) -> bool:
        try:
            first = self._process.pid
            init = _child(first) if self._enclosed else first
            code = _child(init) if self._enclosed and init else init
            if not init or not code:
                return False
            cmdline = Path(f"/proc/{code}/cmdline").read_bytes()
            init_cmdline = Path(f"/proc/{init}/cmdline").read_bytes() if self._enclosed else b""
            if not cmdline or sandbox.is_ours(cmdline, init_cmdline):
                return False
            if self._enclosed:
                self._namespace = NetNamespace.open(init, privileged=self._privileged)
            self._init_fd, self._code_fd = os.pidfd_open(init), os.pidfd_open(code)
            self._init_pid = init
        except (FileNotFoundError, ProcessLookupError):
            return False  # just ended; the watching task says how
        except BackendUnavailable:
            if not _alive(self._process.pid):
                return False
            raise
        return True

    async def dial(self, port: int) -> Channel:
        """See Running.dial."""
        if self._enclosed:
            if self._namespace is None:
                raise ChannelClosed(f"the instance has ended: {self._exited}")
            return await self._namespace.dial("127.0.0.1", port, DIAL_TIMEOUT_S)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        return await connect(sock, "127.0.0.1", self._ports.get(port, port), DIAL_TIMEOUT_S)

    async def listen(self, port: int) -> trio.SocketListener:
        """See Running.listen."""
        if not self._enclosed:
            raise BackendUnavailable(
                f"port {port} cannot be given to each instance: plain processes share this host's network",
                hint="install bubblewrap, or allow user namespaces, so that each instance has a network of its own",
            )
        if self._namespace is None:
            raise BackendUnavailable(f"the instance has ended: {self._exited}")
        return await self._namespace.listen("127.0.0.1", port)

    async def freeze(self) -> None:
        """See Running.freeze."""
        if self._freezer is None:
            raise BackendUnavailable(
                "instances cannot be frozen here: no cgroup is writable",
                hint="run poold as root or as a systemd service with Delegate=yes",
            )
        self._freezer.freeze()
        if not self._freezer.frozen():
            await self._freezer.settle()

    async def thaw(self) -> None:
        """See Running.thaw."""
        if self._freezer is not None:
            self._freezer.thaw()

    async def sample(self) -> Usage:
        """See Running.sample. By the cgroup, else summed over the processes (shared pages count in each)."""
        memory_mb = cpu_s = None
        if self._cgroup is not None and not self._removed:
            with contextlib.suppress(OSError):
                memory_mb, cpu_s = self._cgroup.memory_mb(), self._cgroup.cpu_s()
        if memory_mb is None or cpu_s is None:
            summed = await trio.to_thread.run_sync(_sum_use, self._process.pid)
            memory_mb = summed.memory_mb if memory_mb is None else memory_mb
            cpu_s = summed.cpu_s if cpu_s is None else cpu_s
        return Usage(memory_mb, cpu_s)

    async def stop(self, grace_s: float) -> None:
        """See Running.stop. SIGTERM goes to the code's first process; what outlives grace_s is killed."""
        async with self._stopping:
            if self._removed:
                return
            if self._freezer is not None:
                with contextlib.suppress(OSError):
                    self._freezer.thaw()
            if self._exited is None and grace_s > 0 and _signal(self._code_fd, signal.SIGTERM):
                with trio.move_on_after(grace_s):
                    await self._ended.wait()
            await self._kill()
            if self._cgroup is not None:
                await self._cgroup.remove()
            with trio.move_on_after(LAST_OUTPUT_S):
                await self._output_ended.wait()
            self._release()
            self._on_removed(self)

    async def _kill(self) -> None:
        if self._cgroup is not None:
            await self._cgroup.kill_all()
        elif self._enclosed and self._init_fd < 0 and self._exited is None:
            await self._hold_init()
        if not self._enclosed and self._exited is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        _signal(self._init_fd, signal.SIGKILL)
        if self._exited is None:
            _signal(self._pidfd, signal.SIGKILL)
        with trio.move_on_after(END_TIMEOUT_S) as limit:
            await self._ended.wait()
            # The first process of a pid namespace ends after all others in it.
            if self._init_fd >= 0:
                await trio.lowlevel.wait_readable(self._init_fd)
        if limit.cancelled_caught:
            raise BackendUnavailable(f"{self._instance_id}: process {self._process.pid} does not end when killed")

    async def _hold_init(self) -> None:
        """Given up while the sandbox was being set up, with no cgroup to find it by: its first process may not be tied
        to its parent yet and would live on. Stop the parent, so that it forks no more, then look for the child."""
        _signal(self._pidfd, signal.SIGSTOP)
        with trio.move_on_after(END_TIMEOUT_S):
            while self._exited is None and _state(self._process.pid) not in ("T", "Z", ""):
                with trio.move_on_after(CODE_POLL_S):
                    await self._ended.wait()
        with contextlib.suppress(OSError):
            if init := _child(self._process.pid):
                self._init_fd = os.pidfd_open(init)

    def _release(self) -> None:
        self._removed = True
        for stream in self._streams:
            stream.close()
        if self._namespace is not None:
            self._namespace.close()
            self._namespace = None
        for fd in (self._pidfd, self._init_fd, self._code_fd):
            if fd >= 0:
                os.close(fd)
        self._pidfd = self._init_fd = self._code_fd = -1

    async def _watch(self) -> None:
        await trio.lowlevel.wait_readable(self._pidfd)
        if not self._enclosed:
            # Before the leader is reaped: until then its group's number cannot be another group's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._exited = self._how(self._process.wait())
        self._ended.set()
        if not self._stopping.locked():  # an end that was asked for is no news
            self._on_exit(self)

    def _how(self, code: int) -> str:
        """How it ended, in words. A sandbox reports its code's death by signal N as exit code 128 + N."""
        if self._cgroup is not None and self._cgroup.out_of_memory():
            return "out of memory"
        number = -code if code < 0 else code - 128
        if not 0 < number < signal.NSIG:
            return f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"killed by signal {number} ({signal.Signals(number).name})"
        return f"killed by signal {number}"

    async def _read(self, output: Output, stream: trio.lowlevel.FdStream) -> None:
        try:
            while data := await stream.receive_some(READ_BYTES):
                if output is Output.STDERR and self._init_pid is None:
                    self._head += data[: HEAD_BYTES - len(self._head)]
                self._on_output(output, bytes(data))
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        except Exception:  # a system task must not fail: that would end the daemon
            log.exception("reading an instance's output failed", instance=self._instance_id)
        finally:
            self._open_streams -= 1
            if self._open_streams == 0:
                self._output_ended.set()


def _child(pid: int) -> int | None:
    """The first child of a process. Raises FileNotFoundError or ProcessLookupError when it is gone."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        children = path.read_text().split()
    except FileNotFoundError:
        if not Path(f"/proc/{pid}").exists():
            raise
        # A kernel without CONFIG_PROC_CHILDREN: slower.
        with contextlib.suppress(psutil.NoSuchProcess):
            return next((child.pid for child in psutil.Process(pid).children()), None)
        return None
    return int(children[0]) if children else None


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # a zombie has none
    return False


def _state(pid: int) -> str:
    """The letter of proc(5); "" when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def _signal(pidfd: int, number: signal.Signals) -> bool:
    if pidfd < 0:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True


def _sum_use(pid: int) -> Usage:
    memory_bytes, cpu_s = 0, 0.0
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                memory_bytes += process.memory_info().rss
                cpu_s += times.user + times.system
    return Usage(memory_bytes / (1024 * 1024), cpu_s)
