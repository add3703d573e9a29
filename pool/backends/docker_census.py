"""Which containers this daemon has: those it knows and answers for, those an earlier one left, and strays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import docker.errors
import trio

from pool.backends.base import Found
from pool.backends.docker_client import EngineClient
from pool.backends.docker_container import LABEL_DAEMON, LABEL_INSTANCE, LABEL_REVISION, LABEL_RUN
from pool.backends.docker_running import DockerInstance, Place, exit_text, remove_container
from pool.errors import BackendUnavailable, StartError

STRAY_AFTER_S = 60.0  # an unknown container younger than this may be one that is just being looked at
ALIVE = frozenset({"running", "paused"})
FIND_AT_ONCE = 4
KILLED = 137


class Census:
    """The containers of one daemon. Told by the event feed, asked by the backend."""

    def __init__(
        self,
        engine: EngineClient,
        daemon_id: str,
        run_id: str,
        report: Callable[[DockerInstance], Awaitable[None]],
        attach_again: Callable[[DockerInstance], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._daemon_id = daemon_id
        self._run_id = run_id
        self._report = report
        self._attach_again = attach_again
        self.stray_after_s = STRAY_AFTER_S
        self._known: dict[str, DockerInstance] = {}  # by instance id, from before the create to the end of stop()
        self._left: dict[str, str] = {}  # found, and neither adopted nor removed yet: instance id -> container id
        self._looked = False  # find() has told about all that earlier runs left; what turns up later is a stray

    # Those it knows

    def add(self, instance: DockerInstance) -> None:
        """Answer for it until its forget()."""
        self._known[instance.instance_id] = instance
        self._left.pop(instance.instance_id, None)
        instance.forget = lambda: self.drop(instance)

    def drop(self, instance: DockerInstance) -> None:
        """Answer for it no longer; dropping one that is not known is fine."""
        if self._known.get(instance.instance_id) is instance:
            del self._known[instance.instance_id]

    def hold(self, instance_id: str, container_id: str) -> None:
        """An adoption failed: it stays one that was found, until it is removed."""
        self._left[instance_id] = container_id

    def release(self) -> None:
        """The daemon goes; its instances stay."""
        for instance in self._known.values():
            instance.release()

    # What the event feed says

    async def on_die(self, instance_id: str, container_id: str, exit_code: int) -> None:
        """See docker_events.Watcher."""
        instance = self._the(instance_id, container_id)
        if instance is None:
            return
        if exit_code == KILLED and not instance.out_of_memory and not instance.stopping:
            instance.out_of_memory = await self._was_out_of_memory(container_id)
        # An instance may live on when the kernel killed a child of it, and end well much later.
        await self._ended(instance, exit_text(exit_code, instance.out_of_memory and exit_code != 0))

    def on_out_of_memory(self, instance_id: str, container_id: str) -> None:
        """See docker_events.Watcher. The kernel may have killed a child only; if the instance ends, this is why."""
        instance = self._the(instance_id, container_id)
        if instance is not None:
            instance.out_of_memory = True

    async def on_destroy(self, instance_id: str, container_id: str) -> None:
        """See docker_events.Watcher."""
        instance = self._the(instance_id, container_id)
        if instance is not None:
            await self._ended(instance, "its container was removed by somebody else")

    async def catch_up(self, after_loss: bool) -> None:
        """See docker_events.Watcher."""
        ready = [i for i in self._known.values() if i.ready and i.exited is None]
        states = {row["Id"]: row["State"] for row in await self._list()} if ready else {}
        for instance in ready:
            state = states.get(instance.container_id)
            if state in ALIVE:
                if not instance.attached:
                    await self._attach_again(instance)
            elif not instance.stopping:
                detail = "its container is gone" if state is None else await self._how_it_ended(instance.container_id)
                await self._ended(instance, f"{detail} (the engine was away)" if after_loss else detail)

    async def _ended(self, instance: DockerInstance, detail: str) -> None:
        if instance.note_exit(detail) and instance.ready and not instance.stopping:
            await self._report(instance)

    def _the(self, instance_id: str, container_id: str) -> DockerInstance | None:
        instance = self._known.get(instance_id)
        if instance is None or instance.container_id not in ("", container_id):
            return None
        return instance

    async def _was_out_of_memory(self, container_id: str) -> bool:
        try:
            info = await self._inspect(container_id)
        except (docker.errors.APIError, BackendUnavailable):
            return False
        return bool(info["State"].get("OOMKilled"))

    async def _how_it_ended(self, container_id: str) -> str:
        try:
            state = (await self._inspect(container_id))["State"]
        except docker.errors.NotFound:
            return "its container is gone"
        return exit_text(int(state.get("ExitCode", 0)), bool(state.get("OOMKilled")))

    # What others left

    async def find(self) -> list[Found]:
        """See Backend.find. Raises BackendUnavailable."""
        rows = [row for row in await self._list() if row["Labels"].get(LABEL_INSTANCE) not in self._known]
        found: list[Found] = []
        limiter = trio.CapacityLimiter(FIND_AT_ONCE)

        async def one(row: dict[str, Any]) -> None:
            async with limiter:
                labels = row["Labels"]
                running = row["State"] in ALIVE
                item = Found(
                    instance_id=labels[LABEL_INSTANCE],
                    revision_id=labels.get(LABEL_REVISION, ""),
                    running=running,
                    frozen=running and await self._is_frozen(row["Id"]),
                    age_s=max(0.0, time.time() - float(row["Created"])),
                )
                self._left[item.instance_id] = row["Id"]
                found.append(item)

        async with trio.open_nursery() as nursery:
            for row in rows:
                if LABEL_INSTANCE in row["Labels"]:
                    nursery.start_soon(one, row)
        self._looked = True
        return sorted(found, key=lambda item: item.instance_id)

    def container_of(self, found: Found) -> str:
        """The container of what find() told. Raises StartError."""
        try:
            return self._left[found.instance_id]
        except KeyError:
            raise StartError(f"{found.instance_id} is not among what was found") from None

    async def remove(self, found: Found) -> None:
        """See Backend.remove. Raises BackendUnavailable."""
        instance = self._known.get(found.instance_id)
        if instance is not None:
            await instance.stop(0)
            return
        # From here on it counts as a stray: should this fail, it is removed later.
        container_id = self._left.pop(found.instance_id, None)
        if container_id is not None:
            await self._thaw_and_remove(container_id)

    async def remove_strays(self) -> int:
        """Remove what nobody knows or has been told of, and is no longer new. Raises BackendUnavailable, APIError."""
        removed = 0
        for row in await self._list():
            labels = row["Labels"]
            instance_id = labels.get(LABEL_INSTANCE)
            ours = labels.get(LABEL_RUN) == self._run_id
            if instance_id in self._known or instance_id in self._left or not (ours or self._looked):
                continue
            if time.time() - float(row["Created"]) >= self.stray_after_s:
                await self._thaw_and_remove(row["Id"])
                removed += 1
        return removed

    async def _thaw_and_remove(self, container_id: str) -> None:
        """Frozen processes cannot be killed on cgroup v1, so the engine would wait for their end in vain."""

        def thaw(client: Any) -> None:
            info = client.inspect_container(container_id)
            freezer = Place.of(info).freezer
            if freezer is not None:
                with contextlib.suppress(OSError):  # it has ended
                    freezer.thaw()
            if info["State"].get("Paused"):
                client.unpause(container_id)

        with contextlib.suppress(docker.errors.APIError):  # it is gone
            await self._engine.call(thaw)
        await remove_container(self._engine, container_id)

    async def _is_frozen(self, container_id: str) -> bool:
        def look(client: Any) -> bool:
            info = client.inspect_container(container_id)
            freezer = Place.of(info).freezer
            return bool(info["State"].get("Paused")) or (freezer is not None and freezer.frozen())

        try:
            return await self._engine.query(look)
        except docker.errors.APIError:
            return False  # it ended just now

    async def _list(self) -> list[dict[str, Any]]:
        filters = {"label": [f"{LABEL_DAEMON}={self._daemon_id}"]}
        try:
            rows: list[dict[str, Any]] = await self._engine.query(
                lambda client: client.containers(all=True, filters=filters)
            )
        except docker.errors.APIError as exc:
            raise BackendUnavailable(f"the engine does not list its containers: {exc.explanation}") from exc
        return rows

    async def _inspect(self, container_id: str) -> dict[str, Any]:
        info: dict[str, Any] = await self._engine.query(lambda client: client.inspect_container(container_id))
        return info
