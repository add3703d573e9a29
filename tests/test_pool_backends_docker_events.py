"""The event feed on streams that a test makes up: what no real engine sends on demand."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
import trio
import trio.testing

from pool.backends import docker_events
from pool.backends.base import BackendBack, BackendEvent, BackendLost
from pool.backends.docker_events import EventFeed


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


def died(instance: str, code: str = "3") -> dict[str, Any]:
    return {"Action": "die", "Actor": {"ID": "c", "Attributes": {"instance": instance, "exitCode": code}}}


class Stream:
    """Sends its documents, then stays open."""

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self._documents = documents

    async def documents(self) -> AsyncGenerator[dict[str, Any], None]:
        for document in self._documents:
            yield document
        await trio.sleep_forever()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class Watcher:
    """Notes what it is told; `faults`: how many times catching up fails."""

    def __init__(self, faults: int = 0) -> None:
        self.ended: list[str] = []
        self.faults = faults

    async def catch_up(self, after_loss: bool) -> None:
        await trio.lowlevel.checkpoint()
        if self.faults:
            self.faults -= 1
            raise KeyError("State")

    async def on_die(self, instance_id: str, container_id: str, exit_code: int) -> None:
        self.ended.append(instance_id)

    def on_out_of_memory(self, instance_id: str, container_id: str) -> None: ...

    async def on_destroy(self, instance_id: str, container_id: str) -> None: ...


async def _told(
    monkeypatch: pytest.MonkeyPatch, watcher: Watcher, streams: list[list[dict[str, Any]]]
) -> list[BackendEvent]:
    """Run the feed on one stream after the other, until all that it does then is wait."""
    told: list[BackendEvent] = []

    async def open_stream(*_: object) -> Stream:
        await trio.lowlevel.checkpoint()
        return Stream(streams.pop(0) if streams else [])

    async def tell(event: BackendEvent) -> None:
        told.append(event)

    monkeypatch.setattr(docker_events, "open_stream", open_stream)
    engine: Any = None
    feed = EventFeed(engine, "label", "instance", watcher, tell)
    with trio.move_on_after(60):
        await feed.run()
    return told


@pytest.mark.trio
async def test_an_event_that_makes_no_sense_costs_the_stream_and_not_the_daemon(autojump_clock, monkeypatch) -> None:
    watcher = Watcher()
    told = await _told(monkeypatch, watcher, [[died("a"), died("b", "no number")], [died("c")]])
    assert watcher.ended == ["a", "c"]
    assert told == []  # the next stream was there at once


@pytest.mark.trio
async def test_a_listing_that_makes_no_sense_is_a_loss_until_it_does(autojump_clock, monkeypatch) -> None:
    told = await _told(monkeypatch, Watcher(faults=3), [])
    assert [type(event) for event in told] == [BackendLost, BackendBack]
