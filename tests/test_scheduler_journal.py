"""The journal: bounded, replayed exactly, harmless to load."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scheduler_world import World

from scheduler.errors import InvariantError, JournalError
from scheduler.journal import Replay, dump, replay
from scheduler.messages import Started, Ticked
from scheduler.snapshot import capture


def busy_world(entries: int, invocations: int) -> World:
    """Some of everything: queues, rings, a breaker that drew chances, leases on dead instances."""
    world = World(journal_entries=entries, max_concurrency=3, breaker_failures=1, memory_mb=2000)
    world.deploy("a", min_instances=2, slots=2, reserved=1)
    world.deploy("b", tenant="u", max_uses=3, freeze_after_s=0.0)
    world.deploy("bad", min_instances=1)
    for n in range(invocations):
        world.invoke("ab"[n % 2], timeout_s=5.0, after_s=0.3)
        if n % 3 == 0 and world.granted:
            world.release(next(iter(world.granted)), healthy=n % 4 != 0)
        bad = [instance for instance, revision in world.starting.items() if revision == "bad"]
        if bad:
            world.fail(bad[0])
        elif world.starting:
            world.start(after_s=0.1)
        if n % 5 == 0 and world.running:
            world.die(next(iter(world.running)))
        if n % 2 and world.stopping:
            world.stop()
        world.wait(0.2)
    return world


@pytest.mark.parametrize("entries", [0, 1, 2, 9, 40, 100_000])
def test_the_window_replays_exactly(entries: int) -> None:
    world = busy_world(entries, 60)
    steps = replay(dump(world.core))
    assert min(entries, 1) <= len(steps) <= entries
    assert steps == world.steps[len(world.steps) - len(steps) :]


def test_a_replay_ends_in_the_same_state() -> None:
    world = busy_world(30, 50)
    run = Replay(dump(world.core))
    while run.step():
        pass
    assert capture(run.scheduler._ledger) == capture(world.core._ledger)
    assert run.scheduler.host_stats() == world.core.host_stats()
    assert run.scheduler.next_deadline() == world.core.next_deadline()
    assert dump(run.scheduler)


def test_a_window_is_cut_loose_from_what_follows() -> None:
    world = busy_world(30, 50)
    window = world.core.journal.window()
    before = dump(world.core, window)
    for _ in range(100):
        world.do(Ticked(), 0.1)
    assert dump(world.core, window) == before
    assert dump(world.core) != before


def test_it_is_bounded_and_prefers_quiet_moments() -> None:
    world = World(journal_entries=100)
    world.deploy(max_instances=1, freeze_after_s=None)
    for _ in range(300):
        world.wait(0.0)
        number = world.invoke()
        if world.starting:
            world.start()
        world.release(number)
        assert len(world.core.journal) <= 100
    assert len(world.core.journal) >= 50
    while len(world.core.journal._younger.entries) < 38:
        world.release(world.invoke())
    world.do(Ticked())
    assert len(world.core.journal._younger.entries) == 1, "the tick took the snapshot"


def test_a_refused_event_is_replayed_as_refused() -> None:
    world = World()
    world.deploy()
    with pytest.raises(InvariantError):
        world.do(Started("never"))
    assert replay(dump(world.core))[-1] == (world.now, Started("never"), [])


def changed(path: list[Any], value: Any) -> bytes:
    document = json.loads(dump(busy_world(20, 20).core))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"format": "poold-journal", "version": 1}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_journal_is_refused(data: bytes) -> None:
    with pytest.raises(JournalError):
        replay(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], 2),
        (["format"], "other"),
        (["entries", 0, 1], "Scheduler"),
        (["entries", 0, 1], "__import__"),
        (["entries", 0, 2], [{"a": 1}]),
        (["entries", 0], []),
        (["entries", 3], [1.0, "Started", [5]]),
        (["entries", 3], [None, "Started", ["w-1"]]),
        (["limits", "memory_mb"], None),
        (["limits", "nothing"], 1),
        (["state", "leases"], [[1, 999_999, 0.0]]),
        (["state", "counts"], []),
        (["state", "revisions", 0, "fields"], [1]),
        (["state", "revisions", 0, "spec", "keepalive"], "magic"),
        (["state", "revisions", 0, "spec", "slots"], {"a": []}),
        (["draws"], ["x"]),
    ],
)
def test_a_journal_that_does_not_fit_together_is_refused(path: list[Any], value: Any) -> None:
    with pytest.raises(JournalError):
        replay(changed(path, value))


def test_missing_chance_numbers_are_noticed() -> None:
    world = World(breaker_failures=1)
    world.deploy(min_instances=1)
    world.fail()
    document = json.loads(dump(world.core))
    assert len(document["draws"]) == 1
    document["draws"] = []
    with pytest.raises(JournalError, match="chance numbers"):
        replay(json.dumps(document).encode())


def test_only_a_new_scheduler_is_given_a_state() -> None:
    world = World()
    world.deploy()
    with pytest.raises(InvariantError):
        world.core.restore(lambda ledger: None)
