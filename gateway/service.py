"""The daemon's life: lock, store, backend, restore, recover, serve, reload, drain."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import IO, Any

import psutil
import structlog
import trio

from gateway import systemd
from gateway.apis.native import NativeApi
from gateway.app import App
from gateway.codestore import CodeStore
from gateway.config import RELOADABLE, Config, ConfigError, changed_keys, host_limits, load_config
from gateway.invoke import Invoker
from gateway.limits import ServerLimits
from gateway.listeners import Listener, ListenError, open_listeners
from gateway.logsetup import set_level, set_up_logging
from gateway.metrics import Metrics
from gateway.overrides import override
from gateway.registry import Registry
from gateway.router import Router
from gateway.server import Server
from gateway.store import Store, StoreError
from pool.backends.choice import BackendOptions, Chosen, choose
from pool.contracts.registry import CONTRACTS
from pool.dispatcher import Dispatcher
from pool.errors import BackendUnavailable, PoolError
from pool.recovery import recover
from pool.wire.http1 import Limits
from scheduler.model import HostLimits

log = structlog.get_logger("poold")

SAMPLE_S = 15.0
LAST_ANSWERS_S = 1.0
STALLED_S = 5.0  # the scheduler wanted a tick this long ago: no more signs of life to systemd


class Fatal(Exception):
    """The daemon cannot run: what is wrong and what to do."""


# What a user can put right: told in a line, not as a traceback.
FATAL = (Fatal, ListenError, StoreError, BackendUnavailable, systemd.SystemdError)


class Daemon:
    """A running daemon: its parts, and what its status says."""

    def __init__(self, config_path: Path | None, config: Config, overrides: dict[str, Any]) -> None:
        self.config = config
        self._config_path = config_path
        self._overrides = overrides
        self._began_s = time.monotonic()
        self._stop = trio.Event()
        self._life = trio.CancelScope()
        self._patience = trio.CancelScope()  # with what still runs at the end
        self._reload_asked = False  # before there was anything to reload
        self._warnings: list[str] = []
        self._reload_problem = ""
        self._chosen: Chosen | None = None
        self._server: Server | None = None
        self.draining = False
        self.engine: dict[str, str] = {}

    # --- what status shows ---

    @property
    def backend_name(self) -> str:
        """docker, process or simulated."""
        return self._backend.backend.name

    @property
    def backend_reason(self) -> str:
        """Why it is this backend."""
        return self._backend.reason

    @property
    def isolation(self) -> str:
        """What separates instances."""
        return self._backend.backend.isolation

    @property
    def engine_problem(self) -> str | None:
        """Why the engine does not answer; None while it does."""
        return self._dispatcher.backend_problem

    @property
    def limits(self) -> HostLimits:
        """The host's limits in force."""
        return self._limits

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began_s

    @property
    def listen(self) -> Sequence[str]:
        """The addresses that take requests."""
        return [listener.address() for listener in self._server.listeners] if self._server is not None else []

    def warnings(self) -> Sequence[str]:
        """What its user should know."""
        return [*self._warnings, *([self._reload_problem] if self._reload_problem else [])]

    def drain(self) -> None:
        """Begin to refuse what is new and end what runs. Returns at once."""
        self.draining = True
        self._stop.set()

    @property
    def _backend(self) -> Chosen:
        assert self._chosen is not None
        return self._chosen

    # --- its life ---

    async def run(self) -> None:
        """Run until told to stop. Raises Fatal."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._signals)
            with self._life:
                await self._run()
            nursery.cancel_scope.cancel()

    async def _run(self) -> None:
        daemon_config = self.config.daemon
        state_dir = Path(daemon_config.state_dir)
        async with AsyncExitStack() as stack:
            lock = await trio.to_thread.run_sync(_lock, state_dir)
            stack.callback(lock.close)
            listeners = await trio.to_thread.run_sync(open_listeners, self.config.http)
            for listener in listeners:
                stack.callback(listener.close)
            store = await Store.open(state_dir / "poold.db")
            stack.push_async_callback(store.aclose)
            chosen = await stack.enter_async_context(choose(_options(self.config), store.daemon_id, state_dir))
            self._chosen = chosen
            log.info("backend", name=chosen.backend.name, why=chosen.reason, isolation=chosen.backend.isolation)
            self.engine = await chosen.backend.describe()
            host_memory_mb = psutil.virtual_memory().total // 1_048_576
            cores = len(os.sched_getaffinity(0))
            self._limits = host_limits(self.config, host_memory_mb=host_memory_mb, cores=cores)
            self._dispatcher = Dispatcher(chosen.backend, CONTRACTS, self._limits, epoch=f"{store.epoch:x}")
            await self._serve(store, CodeStore(state_dir / "code"), listeners)

    async def _serve(self, store: Store, codestore: CodeStore, listeners: list[Listener]) -> None:
        dispatcher = self._dispatcher
        async with trio.open_nursery() as nursery:
            await nursery.start(dispatcher.run)
            dispatcher.hold_starts("poold is starting")
            registry = Registry(store, codestore, dispatcher.backend, dispatcher, CONTRACTS)
            await registry.restore()
            recovered = await recover(dispatcher)
            if recovered.adopted or recovered.removed:
                log.info("recovered", adopted=recovered.adopted, removed=recovered.removed)
            dispatcher.release_starts()
            metrics = Metrics()
            api = NativeApi(
                registry=registry,
                dispatcher=dispatcher,
                codestore=codestore,
                logs=dispatcher.logs,
                daemon=self,
                metrics=metrics,
                nursery=nursery,
            )
            invoker = Invoker(dispatcher, metrics, registry.get)
            app = self._app = App(registry, invoker, Router(api.routes()))
            app.configure(self.config.http)
            server = self._server = Server(listeners, app.answer, server_limits(self.config))
            await nursery.start(server.run)
            log.info("listening", addresses=list(self.listen))
            if self._reload_asked:
                await self._reload()
            nursery.start_soon(self._tell_ready, registry)
            nursery.start_soon(self._watchdog)
            nursery.start_soon(self._sample)
            await self._stop.wait()
            self.draining = True
            systemd.notify("STOPPING=1\nSTATUS=draining")
            await self._drain(server)
            nursery.cancel_scope.cancel()

    async def _drain(self, server: Server) -> None:
        limit_s = self.config.daemon.drain_timeout_s
        keep = self.config.daemon.on_exit == "keep"
        log.info("draining", timeout_s=limit_s, instances="kept" if keep else "stopped")
        began_s = trio.current_time()
        server.close()
        self._dispatcher.logs.end()  # who follows logs would hold up the end
        self._patience.deadline = began_s + limit_s
        with self._patience:
            await server.closed.wait()
        left_s = max(0.1, limit_s - (trio.current_time() - began_s))
        in_time = await self._dispatcher.drain(left_s, keep=keep)
        with trio.move_on_after(LAST_ANSWERS_S):  # the callers of what was cut are told
            await server.closed.wait()
        if not keep:
            await self._backend.backend.cleanup()
        log.info("stopped", in_time=in_time)

    async def _signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                if number == signal.SIGHUP:
                    if self._server is None:
                        self._reload_asked = True
                    else:
                        await self._reload()
                elif not self._stop.is_set():
                    self.drain()
                    if self._chosen is None:  # nothing to drain yet
                        self._life.cancel()
                elif self._server is None:
                    self._life.cancel()
                else:
                    log.warning("told to stop a second time: cutting what still runs")
                    self._dispatcher.cut()
                    self._patience.cancel()

    async def _reload(self) -> None:
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            new = await trio.to_thread.run_sync(load_config, self._config_path)
            new = override(new, self._overrides)
        except ConfigError as exc:
            self._reload_problem = f"the configuration was not reloaded, the old one stays: {exc}"
            log.error("not reloaded: the old configuration stays", problem=str(exc))
        else:
            self._reload_problem = ""
            changed = changed_keys(self.config, new)
            later = [key for key in changed if key not in RELOADABLE]
            if later:
                self._reload_problem = f"changed, but in force only after a restart: {', '.join(later)}"
                log.warning("these keys need a restart", keys=later)
            self.config = new
            set_level(new.daemon.log_level)
            assert self._server is not None
            self._server.limits = server_limits(new)
            self._app.configure(new.http)
            log.info("reloaded", changed=[key for key in changed if key not in later])
        systemd.notify("READY=1")

    async def _tell_ready(self, registry: Registry) -> None:
        with trio.move_on_after(self.config.daemon.ready_timeout_s) as waited:
            await registry.wait_floors()
        if waited.cancelled_caught:
            log.warning("ready, though not every floor pool is warm yet")
        systemd.notify("READY=1\nSTATUS=serving")
        log.info("ready", functions=len(registry.list()))

    async def _watchdog(self) -> None:
        """Tell systemd that the scheduler makes progress: this task runs, and no tick is overdue."""
        interval_s = systemd.watchdog_interval_s()
        while interval_s is not None:
            overdue_s = trio.current_time() - self._dispatcher.core.next_deadline()
            if overdue_s < STALLED_S:
                systemd.notify("WATCHDOG=1")
            else:
                log.error("the scheduler does not get its ticks", overdue_s=round(overdue_s, 3))
            await trio.sleep(interval_s)

    async def _sample(self) -> None:
        """Measure the instances' memory now and then, for status and for recycling by memory."""
        while True:
            await trio.sleep(SAMPLE_S)
            await self._dispatcher.sample()


def server_limits(config: Config) -> ServerLimits:
    """The HTTP server's limits as configured."""
    http = config.http
    return ServerLimits(
        max_connections=http.max_connections,
        head=Limits(
            header_count=http.max_header_count, header_bytes=http.max_header_bytes, target_bytes=http.max_target_bytes
        ),
        max_body_bytes=http.max_body_mb * 1_048_576,
        head_timeout_s=http.head_timeout_s,
        body_timeout_s=http.body_timeout_s,
        idle_timeout_s=http.idle_timeout_s,
        allowed_hosts=frozenset(host.lower().encode() for host in http.allowed_hosts),
    )


def run_daemon(config_path: Path | None, config: Config, overrides: dict[str, Any]) -> int:
    """Run the daemon to its end; its exit code: 0 stopped as told, 1 could not run, 2 bad configuration."""
    try:
        config = override(config, overrides)
    except ConfigError as exc:
        sys.stderr.write(f"poold: {exc}\n")
        return 2
    set_up_logging(config.daemon.log_format, config.daemon.log_level)
    # What is loaded by now stays: the collector need not look at it again, nor run after every few requests.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    daemon = Daemon(config_path, config, overrides)
    fatal: list[BaseException] = []
    try:
        trio.run(daemon.run)
    except* FATAL as group:
        fatal = _leaves(group)
    for failure in fatal:
        hint = failure.hint if isinstance(failure, PoolError) else ""
        sys.stderr.write(f"poold: {failure}\n" + (f"  {hint}\n" if hint else ""))
    return 1 if fatal else 0


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for exc in group.exceptions:
        found.extend(_leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc])
    return found


def _lock(state_dir: Path) -> IO[str]:
    """Take the state directory for this process alone. Raises Fatal."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        lock = (state_dir / "lock").open("a+")
    except OSError as exc:
        raise Fatal(
            f"the state directory {state_dir} cannot be used: {exc.strerror}; give another with --state-dir"
        ) from exc
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        lock.seek(0)
        other = lock.read().strip()
        lock.close()
        raise Fatal(
            f"another poold (pid {other or 'unknown'}) uses {state_dir}: stop it, or give --state-dir another directory"
        ) from exc
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _options(config: Config) -> BackendOptions:
    docker = config.docker
    return BackendOptions(
        kind=config.daemon.backend,
        docker_host=docker.host,
        docker_network=docker.network,
        docker_cert_path=docker.cert_path,
        registry_auth_file=docker.registry_auth_file,
        sandbox=config.process.sandbox,
    )
