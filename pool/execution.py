"""Carries out what the core decides about instances: starts, stops, freezes, each in a task of its own."""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from pool.backends.base import Backend, Running
from pool.deployment import Deployment, prepare
from pool.errors import BackendUnavailable, PoolError, RestartWanted, StartError
from pool.instance import Instance
from pool.logbook import LogBook
from scheduler.messages import (
    CancelStart,
    Died,
    Event,
    Freeze,
    FreezeFailed,
    Frozen,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
)
from scheduler.model import StopReason

log = structlog.get_logger("poold.instances")

RETRY_STOP_S = 5.0
# No pre-stop hook for these: the code is gone, or cannot be trusted to answer.
NO_HOOK = frozenset((StopReason.DIED, StopReason.BROKEN))


class Execution:
    """Owns the prepared instances and the starts under way. Every result goes to `feed` as an event.

    `nursery` is set when the dispatcher runs; nothing may be asked for before.
    """

    def __init__(
        self, backend: Backend, book: LogBook, deployments: dict[str, Deployment], feed: Callable[[Event], None]
    ) -> None:
        self.instances: dict[str, Instance] = {}
        self.starts: dict[str, trio.CancelScope] = {}
        self.stopping = 0
        self.nursery: trio.Nursery | None = None
        self.engine_back = trio.Event()  # set, and replaced, when a lost engine answers again
        self._backend = backend
        self._book = book
        self._deployments = deployments
        self._feed = feed

    # --- asked for by the core ---

    def begin_start(self, action: Start) -> None:
        """Start an instance; ends in Started, StartFailed, or Stopped when it was cancelled."""
        scope = self.starts[action.instance] = trio.CancelScope()
        self._spawn().start_soon(self._start, action, scope)

    def cancel_start(self, action: CancelStart) -> None:
        """Give a start up. One that has just succeeded stays, and the core stops it."""
        scope = self.starts.get(action.instance)
        if scope is not None:
            scope.cancel()

    def begin_stop(self, action: Stop) -> None:
        """Stop an instance; ends in Stopped."""
        self.stopping += 1
        self._spawn().start_soon(self._stop, self.instances[action.instance], action.reason)

    def begin_freeze(self, action: Freeze) -> None:
        """Freeze an instance; ends in Frozen or FreezeFailed, or in nothing when a thaw overtakes it."""
        instance = self.instances[action.instance]
        self._spawn().start_soon(self._freeze, instance, instance.ask_freeze())

    async def cut_all(self) -> None:
        """End everything now, whatever it is doing."""
        for scope in list(self.starts.values()):
            scope.cancel()
        async with trio.open_nursery() as nursery:
            for instance in list(self.instances.values()):
                nursery.start_soon(self._end_quietly, instance)

    # --- tasks ---

    async def _start(self, action: Start, scope: trio.CancelScope) -> None:
        deployment = self._deployments[action.revision]
        failure: StartError | None = None
        instance: Instance | None = None
        with scope:
            try:
                instance = await prepare(self._backend, deployment, action.instance, self._book, self._leave)
            except StartError as exc:
                failure = exc
            except PoolError as exc:
                failure = StartError(exc.message, hint=exc.hint, backend_fault=isinstance(exc, BackendUnavailable))
            except Exception as exc:  # a fault in one function's start must not end the daemon under the others
                log.exception("a start failed unexpectedly", instance=action.instance)
                failure = StartError(f"an error inside poold: {exc}", hint="its log has the details")
        del self.starts[action.instance]
        if instance is not None:
            self.instances[action.instance] = instance
            deployment.prepared += 1
            deployment.last_error = None
            self._feed(Started(action.instance))
            if instance.running.exited is not None:  # the backend told so before anybody knew the instance
                self._feed(Died(action.instance, instance.running.exited))
        elif failure is not None:
            log.warning(
                "start failed",
                function=deployment.revision.spec.name,
                instance=action.instance,
                error=failure.message,
                log_tail=failure.log_tail[-500:],
            )
            deployment.last_error = failure
            self._feed(StartFailed(action.instance, failure.message, failure.backend_fault, failure.permanent))
        else:
            self._feed(Stopped(action.instance))
        deployment.wake()

    async def _stop(self, instance: Instance, reason: StopReason) -> None:
        spec = instance.revision.spec
        stopped = False
        with trio.CancelScope(shield=True):
            try:
                await instance.end(spec.stop_grace_s, hook=reason not in NO_HOOK)
                stopped = True
            except BackendUnavailable as exc:
                log.warning("not stopped now, but when the engine answers", instance=instance.id, error=exc.message)
            except Exception:  # as in _start
                log.exception("a stop failed unexpectedly, and is tried again", instance=instance.id)
        if not stopped:
            await self._stop_later(instance.running)
        self.stopping -= 1
        self.instances.pop(instance.id, None)
        self._feed(Stopped(instance.id))
        log.debug("stopped", function=spec.name, instance=instance.id, reason=str(reason))

    def _leave(self, running: Running) -> None:
        """A failed start could not clean up after itself, because the engine has gone."""
        self._spawn().start_soon(self._stop_later, running)

    async def _stop_later(self, running: Running) -> None:
        """Stop it when the engine answers again. Cancelled with the daemon: the next one recovers what is left."""
        while True:
            with trio.move_on_after(RETRY_STOP_S):
                await self.engine_back.wait()
            try:
                with trio.CancelScope(shield=True):
                    await running.stop(0)
            except BackendUnavailable:
                continue
            except Exception as exc:  # noqa: BLE001 - as in _start; a line each time, not a traceback
                log.error("still not stopped", instance=running.instance_id, error=repr(exc))
                continue
            return

    async def _freeze(self, instance: Instance, asked: int) -> None:
        try:
            frozen = await instance.freeze(asked) if instance.running.can_freeze else None
        except (OSError, BackendUnavailable) as exc:
            log.warning("not frozen", instance=instance.id, error=str(exc))
            frozen = None
        except RestartWanted as exc:
            log.info("replaced at its own wish", instance=instance.id, why=exc.message)
            if instance.id in self.instances:
                self._feed(Died(instance.id, exc.message))
            return
        except Exception:  # as in _start
            log.exception("a freeze failed unexpectedly", instance=instance.id)
            frozen = None
        if instance.id not in self.instances:
            return
        if frozen is None:
            self._feed(FreezeFailed(instance.id))
        elif frozen:
            self._feed(Frozen(instance.id))

    async def _end_quietly(self, instance: Instance) -> None:
        try:
            await instance.end(0, hook=False)
        except BackendUnavailable as exc:
            log.warning("an instance could not be stopped", instance=instance.id, error=exc.message)
        except Exception:  # the others are to be stopped all the same
            log.exception("an instance could not be stopped", instance=instance.id)

    def _spawn(self) -> trio.Nursery:
        assert self.nursery is not None
        return self.nursery
