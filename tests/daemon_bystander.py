"""A function that must not notice what happens to others."""

from __future__ import annotations

from daemon_kit import Poold
from daemon_traces import instance_cgroups
from daemon_waiting import wait_until


class Bystander:
    """A function beside the one under test: whatever happens to that, this one's only instance goes on."""

    NAME = "bystander"

    def __init__(self, poold: Poold) -> None:
        self._poold = poold
        poold.deploy(self.NAME, "counter", pool={"min": 1, "max": 1})
        self._instance, self._count = self._ask()

    def check(self) -> None:
        """It has answered all along, by the same instance."""
        instance, count = self._ask()
        assert (instance, count) == (self._instance, self._count + 1)
        self._count = count

    def _ask(self) -> tuple[str, int]:
        reply = self._poold.ask(self.NAME)
        assert reply.status == 200, reply
        instance, count = reply.body.split()
        return instance.decode(), int(count)

    def alone(self) -> None:
        """Remove every other function: nothing of them may be left, and no slot taken."""
        poold = self._poold
        for row in poold.call("GET", "/v1/functions")["functions"]:
            if row["name"] != self.NAME:
                poold.remove(row["name"])
        found = wait_until(
            lambda: poold.call("GET", "/v1/instances")["instances"],
            lambda found: len(found) == 1,
            what="their end",
        )
        assert found[0]["function"] == self.NAME
        self.check()
        status = poold.status()
        assert (status["running"], status["queued"], status["starts_in_flight"]) == (0, 0, 0)
        if status["backend"] == "docker":
            assert len(poold.containers()) == 1
        elif cgroups_of := instance_cgroups(poold.daemon_id()):
            assert len({path.name for path in cgroups_of}) == 1
