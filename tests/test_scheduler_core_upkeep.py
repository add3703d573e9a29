"""Keep-alive, freezing, recycling, deaths, adoption: what becomes of instances."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scheduler_world import World

from scheduler.errors import InvariantError
from scheduler.messages import (
    Adopted,
    CancelStart,
    Died,
    Event,
    Freeze,
    FreezeFailed,
    Frozen,
    Recycled,
    Sampled,
    Scaled,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
    Thawed,
)
from scheduler.model import StartKind, StopReason


def idle(n: int = 1, **spec: Any) -> World:
    """A world with n idle instances that have served, above a floor of 0 unless `spec` says more."""
    world = World(max_starts=50, memory_mb=100_000)
    world.deploy(max_instances=n, **{"freeze_after_s": None, **spec})
    numbers = [world.invoke(timeout_s=100) for _ in range(n * spec.get("slots", 1))]
    world.start_all()
    for number in numbers:
        world.release(number)
    return world


# --- keep-alive -------------------------------------------------------------------------------------------


def test_ttl_counts_from_the_last_use() -> None:
    world = idle(keepalive_s=600.0)
    world.wait(500.0)
    world.release(world.invoke())
    world.wait(599.0)
    assert world.running
    assert world.wait(1.0) == [Stop("w-1", StopReason.EXPIRED)]


def test_ttl_applies_to_frozen_ones_too() -> None:
    world = idle(keepalive_s=600.0, freeze_after_s=1.0)
    assert world.wait(600.0) == [Freeze("w-1"), Stop("w-1", StopReason.EXPIRED)]


def test_lru_keeps_them_for_ever() -> None:
    world = idle(keepalive="lru", keepalive_s=1.0)
    assert world.core.next_deadline() == math.inf
    assert world.wait(1e6) == []


def test_the_floor_outlives_its_keep_alive() -> None:
    world = idle(3, min_instances=1, keepalive_s=10.0)
    stops = world.wait(100.0)
    assert [type(action) for action in stops] == [Stop, Stop]
    assert len(world.running) == 1
    assert world.core.next_deadline() == math.inf


def test_what_the_floor_held_goes_when_the_floor_does() -> None:
    world = idle(1, min_instances=1, keepalive_s=10.0)
    world.wait(100.0)
    world.do(Scaled("r", min_instances=0))
    assert world.wait(0.1) == [Stop("w-1", StopReason.EXPIRED)]


def test_a_warm_hit_sets_no_timer() -> None:
    world = idle(keepalive_s=600.0, freeze_after_s=1.0)
    entries = world.core._ledger.timers.count
    for _ in range(100):
        world.release(world.invoke(), 0.001)
    assert world.core._ledger.timers.count == entries


# --- freezing ---------------------------------------------------------------------------------------------


def test_frozen_after_its_idle_time_counted_from_the_last_use() -> None:
    world = idle(freeze_after_s=1.0)
    world.wait(0.8)
    world.release(world.invoke())
    assert world.wait(0.9) == []
    assert world.wait(0.1) == [Freeze("w-1")]
    assert world.do(Frozen("w-1")) == []


def test_a_busy_one_is_not_frozen() -> None:
    world = idle(freeze_after_s=1.0)
    number = world.invoke()
    assert world.wait(50.0) == []
    world.release(number)
    assert world.wait(1.0) == [Freeze("w-1")]


def test_a_freeze_that_failed_gives_a_running_idle_instance() -> None:
    world = idle(freeze_after_s=1.0)
    world.wait(1.0)
    world.frozen.clear()
    assert world.do(FreezeFailed("w-1", permanent=True)) == []
    assert world.kinds[world.invoke()] is StartKind.WARM
    world.release(2)
    assert world.wait(50.0) == [], "not tried again"


def test_a_freeze_that_failed_for_now_is_tried_again_but_not_at_once() -> None:
    world = idle(freeze_after_s=0.0)
    assert world.frozen
    world.frozen.clear()
    assert world.do(FreezeFailed("w-1", permanent=False)) == []
    assert world.wait(0.9) == []
    assert world.wait(0.1) == [Freeze("w-1")]


def test_a_freeze_that_failed_keeps_the_order_of_last_use() -> None:
    world = idle(2, freeze_after_s=1.0)
    world.wait(0.5)
    recent = world.granted[world.invoke()]
    world.wait(0.5)
    (cold,) = world.frozen
    world.release(3)
    world.frozen.clear()
    world.do(FreezeFailed(cold))
    assert world.granted[world.invoke()] == recent


def test_a_grant_overtakes_a_freeze_and_its_failure_changes_nothing() -> None:
    world = idle(freeze_after_s=1.0)
    world.wait(1.0)
    number = world.invoke()
    assert world.kinds[number] is StartKind.THAWED
    assert world.do(FreezeFailed("w-1")) == []
    assert world.do(Thawed("w-1", 0.002)) == []
    assert world.core.revision_stats("r").thaw_s == 0.002


# --- recycling --------------------------------------------------------------------------------------------


def test_recycled_by_uses() -> None:
    world = idle(max_uses=2)
    assert world.release(world.invoke()) == [Stop("w-1", StopReason.USED_UP)]


def test_several_slots_do_not_outrun_the_uses() -> None:
    world = World()
    world.deploy(max_uses=2, slots=4, max_instances=1)
    numbers = [world.invoke() for _ in range(3)]
    world.start()
    assert [number in world.granted for number in numbers] == [True, True, False]
    world.release(numbers[0], used=False)
    assert numbers[2] in world.granted, "an unused lease is given back"


def test_recycled_by_age_when_idle() -> None:
    world = idle(max_age_s=100.0)
    assert world.wait(99.0) == []
    assert world.wait(1.0) == [Stop("w-1", StopReason.AGED)]


def test_recycled_by_age_at_the_release() -> None:
    world = idle(max_age_s=100.0)
    number = world.invoke()
    world.wait(150.0)
    assert world.release(number) == [Stop("w-1", StopReason.AGED)]


def test_a_floor_of_one_age_is_renewed_one_by_one() -> None:
    world = World(max_starts=5)
    world.deploy(min_instances=3, max_instances=5, max_age_s=100.0, freeze_after_s=None)
    world.start_all()
    world.wait(100.0)
    for round_ in range(3):
        assert len(world.running) == 2, round_
        world.stop()
        world.start_all()
        world.wait(1.0)
    assert len(world.running) == 3


def test_recycled_by_memory_when_idle() -> None:
    world = idle(max_memory_mb=100)
    assert world.do(Sampled("w-1", 99.0)) == []
    assert world.core.instance_view("w-1").memory_mb == 99.0
    assert world.do(Sampled("w-1", 101.0)) == [Stop("w-1", StopReason.MEMORY_GROWTH)]


def test_recycled_by_memory_at_the_release() -> None:
    world = idle(max_memory_mb=100)
    number = world.invoke()
    assert world.do(Sampled("w-1", 101.0)) == []
    assert world.release(number) == [Stop("w-1", StopReason.MEMORY_GROWTH)]


def test_a_user_recycles() -> None:
    world = idle(2, max_uses=None)
    number = world.invoke()
    world.deploy("s", min_instances=1)
    (stop,) = world.do(Recycled("r"))
    assert isinstance(stop, Stop)
    assert stop.reason is StopReason.RECYCLED
    assert Stop("w-2", StopReason.RECYCLED) in [stop, *world.release(number)]
    assert world.do(Recycled("s")) == [CancelStart("w-3", StopReason.RECYCLED), Start("w-4", "s", awaited=False)]


# --- deaths -----------------------------------------------------------------------------------------------


def test_a_death_while_serving_leaves_the_lease_to_its_holder() -> None:
    world = idle()
    number = world.invoke()
    assert world.die("w-1") == [Stop("w-1", StopReason.DIED)]
    assert world.core.instance_view("w-1").leases == 1
    assert world.release(number, healthy=False) == []
    assert world.stop() == []
    assert world.core.instances() == []


def test_the_clean_up_may_end_before_the_lease() -> None:
    world = idle()
    number = world.invoke()
    world.die("w-1")
    world.stop()
    assert world.core.host_stats().running == 1
    assert world.release(number, healthy=False) == []
    assert world.core.host_stats().running == 0


def test_who_waits_for_one_that_died_has_another_start() -> None:
    world = idle()
    number = world.invoke()
    waits = world.invoke()
    world.die("w-1")
    world.release(number, healthy=False)
    assert world.stop() == [Start("w-2", "r", awaited=True)]
    world.start()
    assert world.kinds[waits] is StartKind.COLD


def test_a_death_that_is_told_twice_or_late_is_old_news() -> None:
    world = idle()
    world.die("w-1")
    assert world.do(Died("w-1")) == []
    world.stop()
    for event in (Died("w-1"), Frozen("w-1"), FreezeFailed("w-1"), Thawed("w-1", 0.1), Sampled("w-1", 1.0)):
        assert world.do(event) == []


# --- adoption ---------------------------------------------------------------------------------------------


def adopt(world: World, identity: str, revision: str = "r", age_s: float = 0.0) -> list[Any]:
    world.running[identity] = revision
    return world.do(Adopted(identity, revision, age_s))


def test_an_adopted_instance_has_run_before() -> None:
    world = World()
    world.deploy(freeze_after_s=None)
    assert adopt(world, "old-7", age_s=50.0) == []
    view = world.core.instance_view("old-7")
    assert view.started_at == world.now - 50.0
    number = world.invoke()
    assert (world.granted[number], world.kinds[number]) == ("old-7", StartKind.WARM)


def test_adopting_above_the_ceiling_stops_the_surplus() -> None:
    world = World()
    world.deploy(max_instances=1, freeze_after_s=None)
    adopt(world, "old-1")
    assert adopt(world, "old-2") == [Stop("old-2", StopReason.SURPLUS)]


def test_adopting_above_the_memory_budget_stops_it() -> None:
    world = World(memory_mb=300)
    world.deploy(memory_mb=200, freeze_after_s=None)
    adopt(world, "old-1")
    assert adopt(world, "old-2") == [Stop("old-2", StopReason.EVICTED)]


def test_an_adopted_one_serves_who_waits_and_fills_the_floor() -> None:
    world = World()
    world.deploy("r", max_instances=2)
    number = world.invoke()
    adopt(world, "old-1")
    assert world.granted[number] == "old-1"


def test_adopting_one_too_old_stops_it() -> None:
    world = World()
    world.deploy(max_age_s=10.0)
    adopt(world, "old-1", age_s=20.0)
    assert world.wait(0.0) == [Stop("old-1", StopReason.AGED)]


# --- answers that fit nothing -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        Started("w-1"),
        Started("w-9"),
        StartFailed("w-1", "late"),
        StartFailed("w-9", ""),
        Stopped("w-1"),
        Stopped("w-9"),
        Frozen("w-2"),
        FreezeFailed("w-2"),
        Thawed("w-2", 0.1),
        Stopped("w-2"),
        Adopted("w-1", "r"),
        Adopted("old-1", "nothing"),
    ],
)
def test_an_impossible_answer_is_refused_and_changes_nothing(event: Event) -> None:
    world = World()
    world.deploy(min_instances=2)
    world.start("w-1")
    before = world.core.instances(), world.core.host_stats(), world.core.revision_stats("r")
    with pytest.raises(InvariantError, match=r"w-\d|old-1"):
        world.do(event)
    assert (world.core.instances(), world.core.host_stats(), world.core.revision_stats("r")) == before
