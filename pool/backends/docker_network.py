"""The networks instances are on: poold's own bridge, none, or one that the user made."""

from __future__ import annotations

import docker.errors
import trio
from docker import APIClient

from pool.backends.docker_client import EngineClient
from pool.backends.docker_container import LABEL_DAEMON
from pool.errors import ArtifactError, BackendUnavailable

NO_TRAFFIC_BETWEEN = {"com.docker.network.bridge.enable_icc": "false"}
_NOT_OURS = "use bridge (poold's own), none, or the name of a network made with docker network create"


class Networks:
    """Knows which networks exist, and makes the daemon's own when it is first needed."""

    def __init__(self, engine: EngineClient, name: str, daemon_id: str) -> None:
        self._engine = engine
        self._name = name
        self._daemon_id = daemon_id
        self._made = False
        self._lock = trio.Lock()

    async def check(self, network: str) -> None:
        """That a spec's network can be used. Raises ArtifactError, BackendUnavailable."""
        if network in ("bridge", "none"):
            return
        if network in ("host", "default") or network.startswith("container:"):
            raise ArtifactError(f"network {network!r} is refused: it has no wall around the instance", hint=_NOT_OURS)
        found = await self._engine.query(lambda client: client.networks(names=[network]))
        exact = [n for n in found if n["Name"] == network or n["Id"].startswith(network)]
        if not exact:
            raise ArtifactError(f"the engine has no network {network!r}", hint=f"docker network create {network}")
        if exact[0]["Driver"] in ("host", "null"):
            raise ArtifactError(f"network {network!r} is the engine's {exact[0]['Driver']} network", hint=_NOT_OURS)

    async def for_spec(self, network: str) -> str:
        """What the engine must be told for a spec's network. Raises BackendUnavailable, docker's APIError."""
        if network != "bridge":
            return network
        if not self._made:
            async with self._lock:
                if not self._made:
                    await self._engine.call(self._make)
                    self._made = True
        return self._name

    def forget(self) -> None:
        """It turned out not to exist any more: the next for_spec() makes it again."""
        self._made = False

    async def remove(self) -> None:
        """Remove the daemon's own, unless something is on it."""
        self._made = False
        await self._engine.call(self._remove)

    def _existing(self, client: APIClient) -> list[dict[str, object]]:
        return [n for n in client.networks(names=[self._name]) if n["Name"] == self._name]

    def _is_own(self, network: dict[str, object]) -> bool:
        labels = network.get("Labels") or {}
        return isinstance(labels, dict) and labels.get(LABEL_DAEMON) == self._daemon_id

    def _make(self, client: APIClient) -> None:
        for network in self._existing(client):
            if not self._is_own(network):
                return  # the administrator's choice
            options = network.get("Options") or {}
            if not (isinstance(options, dict) and options.items() >= NO_TRAFFIC_BETWEEN.items()):
                raise BackendUnavailable(
                    f"the docker network {self._name} exists, and lets its containers reach each other",
                    hint=f"docker network rm {self._name}: poold makes it again",
                )
            return
        client.create_network(
            self._name,
            driver="bridge",
            options=NO_TRAFFIC_BETWEEN,
            labels={LABEL_DAEMON: self._daemon_id},
            check_duplicate=True,
        )

    def _remove(self, client: APIClient) -> None:
        for network in self._existing(client):
            if not self._is_own(network):
                continue
            try:
                client.remove_network(str(network["Id"]))
            except docker.errors.APIError as exc:
                if exc.status_code not in (403, 404, 409):  # containers are on it, or it is gone
                    raise
