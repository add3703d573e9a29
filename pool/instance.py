"""One instance as the dispatcher holds it: its running code, its session, its log, freezing and ending."""

from __future__ import annotations

import contextlib

import structlog
import trio

from pool.backends.base import Running
from pool.contracts.base import Session
from pool.errors import BackendUnavailable, RestartWanted
from pool.logs import InstanceLog
from pool.spec import Revision

log = structlog.get_logger("poold.instance")


class Instance:
    """Owned by the dispatcher; the core says what happens to it, this carries it out in order."""

    __slots__ = (
        "_freeze_asked",
        "_freeze_scope",
        "_freeze_settled",
        "_thawing",
        "frozen",
        "id",
        "log",
        "prepared_at_s",
        "resting",
        "revision",
        "running",
        "session",
        "stages",
    )

    def __init__(
        self,
        instance_id: str,
        revision: Revision,
        running: Running,
        session: Session,
        instance_log: InstanceLog,
        stages: dict[str, float],
    ) -> None:
        self.id = instance_id
        self.revision = revision
        self.running = running
        self.session = session
        self.log = instance_log
        self.stages = stages  # seconds: start, connect, init
        self.prepared_at_s = trio.current_time()
        self.frozen = False
        self.resting = False  # frozen, or on its way there or back: not to be spoken to before thaw() returns
        self._thawing: trio.Event | None = None
        self._freeze_asked = 0  # goes up with each freeze asked for and each thaw: the last word counts
        self._freeze_scope: trio.CancelScope | None = None
        self._freeze_settled: trio.Event | None = None

    def ask_freeze(self) -> int:
        """A freeze is decided; its task runs later, and a thaw() may come first. Returns what freeze() takes."""
        self._freeze_asked += 1
        return self._freeze_asked

    async def freeze(self, asked: int) -> bool:
        """Run the hook, then freeze. False when a thaw() overtook it.

        Raises OSError, BackendUnavailable; RestartWanted when the code asked to be replaced and nobody uses it.
        """
        if asked != self._freeze_asked:
            return False
        settled = self._freeze_settled = trio.Event()
        self.resting = True
        try:
            with trio.CancelScope() as scope:
                self._freeze_scope = scope
                try:
                    await self.session.before_freeze()
                except RestartWanted:
                    if not scope.cancel_called:
                        raise
                # From here on the thaw waits: a freeze half done must be undone, not given up.
                with trio.CancelScope(shield=True):
                    if not scope.cancel_called:
                        try:
                            await self.running.freeze()
                        except Exception:
                            # It may have taken effect all the same, and would then rest for ever.
                            with contextlib.suppress(OSError, BackendUnavailable):
                                await self.running.thaw()
                            raise
                        self.frozen = True
                        await self.session.after_freeze()
        finally:
            self._freeze_scope = None
            self._freeze_settled = None
            self.resting = self.frozen
            settled.set()
        return self.frozen

    async def thaw(self) -> None:
        """Let it run again, whatever freeze() is doing. No checkpoint when nothing has to be waited for.

        Several may ask at a time; one does it and the others wait. Raises OSError, BackendUnavailable: the instance
        cannot be used then.
        """
        self._freeze_asked += 1
        while self._thawing is not None:
            await self._thawing.wait()
        if not self.resting:
            return
        done = self._thawing = trio.Event()
        try:
            if self._freeze_scope is not None and self._freeze_settled is not None:
                settled = self._freeze_settled
                self._freeze_scope.cancel()
                await settled.wait()
            if self.frozen:
                await self.running.thaw()
                self.frozen = False
            self.resting = False
        finally:
            self._thawing = None
            done.set()

    async def end(self, grace_s: float, *, hook: bool) -> None:
        """Run the pre-stop hook, close the connections, stop it. Raises BackendUnavailable."""
        if hook and self.running.exited is None:
            try:
                await self.thaw()
                await self.session.before_stop()
            except Exception as exc:  # noqa: BLE001 - whatever goes wrong with the hook, the stop goes on
                log.warning("pre-stop hook failed", instance=self.id, error=str(exc))
        self.session.close()
        try:
            await self.running.stop(grace_s)
        finally:
            self.log.close()
