"""The engine's event stream: exits are known as they happen, and a lost engine is noticed and waited for.

No exit may fall between two streams. So each time a stream is open, and before its first event is read, the
containers are listed: what ended before is in the list, what ends after is in the stream.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import docker.errors
import structlog
import trio

from pool.backends.base import BackendBack, BackendEvent, BackendLost
from pool.backends.docker_client import EngineClient
from pool.backends.docker_stream import EngineRefused, open_stream
from pool.errors import BackendUnavailable

log = structlog.get_logger("poold.docker")

RETRY_FIRST_S, RETRY_MAX_S = 0.1, 5.0


class Watcher(Protocol):
    """Who the feed tells."""

    async def catch_up(self, after_loss: bool) -> None:
        """A stream is open: see by listing what happened before it. Raises BackendUnavailable, APIError."""

    async def on_die(self, instance_id: str, container_id: str, exit_code: int) -> None: ...

    def on_out_of_memory(self, instance_id: str, container_id: str) -> None: ...

    async def on_destroy(self, instance_id: str, container_id: str) -> None: ...


class EventFeed:
    """Reads the events of one daemon's containers for as long as run() runs."""

    def __init__(
        self,
        engine: EngineClient,
        label_filter: str,
        instance_label: str,
        watcher: Watcher,
        send: Callable[[BackendEvent], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._instance_label = instance_label
        self._watcher = watcher
        self._send = send
        self._lost = False
        self._scope = trio.CancelScope()
        filters = {"type": ["container"], "event": ["die", "oom", "destroy"], "label": [label_filter]}
        self._query = {"filters": json.dumps(filters)}

    @property
    def lost(self) -> bool:
        """True from a loss until all that was missed has been reported."""
        return self._lost

    def doubt(self) -> None:
        """Somebody else found the engine not to answer: drop the stream and open a new one."""
        self._scope.cancel()

    async def check(self) -> None:
        """That the engine gives its events at all. Raises BackendUnavailable."""
        try:
            await (await open_stream(self._engine, "GET", "/events", self._query)).aclose()
        except EngineRefused as exc:
            raise BackendUnavailable(
                f"the engine at {self._engine.endpoint.host} does not give its events: {exc.message}",
                hint="a proxy before it must allow GET /events, and the containers', images' and networks' paths",
            ) from exc

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Never returns. Started when the first stream is open; check() first."""
        retry_s = RETRY_FIRST_S
        first_try = True
        while True:
            detail = ""
            try:
                with trio.CancelScope() as self._scope:
                    async with contextlib.aclosing(await open_stream(self._engine, "GET", "/events", self._query)) as s:
                        await self._watcher.catch_up(after_loss=self._lost)
                        if self._lost:
                            self._lost = False
                            await self._send(BackendBack())
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
                        retry_s, first_try = RETRY_FIRST_S, True
                        async with contextlib.aclosing(s.documents()) as documents:
                            async for document in documents:
                                await self._take(document)
                detail = "its event stream ended"
            except BackendUnavailable as exc:
                detail = exc.message
            except (EngineRefused, docker.errors.APIError) as exc:
                detail = str(exc)
            except Exception as exc:  # an event that nobody foresaw must not end the daemon
                log.exception("reading the engine's events failed unexpectedly")
                detail = f"its events could not be read: {exc}"
            if first_try:  # a proxy may close a stream that was quiet for long: that alone is no loss
                first_try = False
                continue
            if not self._lost:
                self._lost = True
                await self._send(BackendLost(detail))
            await trio.sleep(retry_s)
            retry_s = min(retry_s * 2, RETRY_MAX_S)

    async def _take(self, document: dict[str, Any]) -> None:
        actor = document.get("Actor") or {}
        attributes = actor.get("Attributes") or {}
        instance_id, container_id = attributes.get(self._instance_label), str(actor.get("ID", ""))
        if instance_id is None:
            return
        action = document.get("Action")
        if action == "die":
            await self._watcher.on_die(instance_id, container_id, int(attributes.get("exitCode", 0)))
        elif action == "oom":
            self._watcher.on_out_of_memory(instance_id, container_id)
        elif action == "destroy":
            await self._watcher.on_destroy(instance_id, container_id)
