"""Which instances start: budget, memory, floors, failures, crash loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
from scheduler_world import World

from scheduler.breaker import BreakerState
from scheduler.messages import Abandoned, BackendDown, BackendUp, BreakerReset, Reject, Start, Stop
from scheduler.model import RejectReason, StartKind, StopReason


def two_full_of_idle(**spec: Any) -> World:
    """400 MB of 400: two idle instances of `old`, used one after the other, above its floor of none."""
    world = World(memory_mb=400, max_starts=4)
    world.deploy("old", max_instances=2, memory_mb=200, freeze_after_s=None, **spec)
    numbers = [world.invoke("old"), world.invoke("old")]
    world.start_all()
    for number in numbers:
        world.release(number, 1.0)
    return world


# --- budget -----------------------------------------------------------------------------------------------


def test_no_more_starts_in_flight_than_the_budget() -> None:
    world = World(max_starts=2, memory_mb=100_000)
    world.deploy(min_instances=5)
    assert len(world.starting) == 2
    world.start()
    assert len(world.starting) == 2
    world.start_all()
    assert len(world.running) == 5


def test_a_start_that_is_waited_for_comes_before_a_refill() -> None:
    world = World(max_starts=1, memory_mb=100_000)
    world.deploy("floor", min_instances=3)
    world.deploy("wanted")
    world.invoke("wanted")
    actions = world.start()
    assert actions == [Start("w-2", "wanted", awaited=True)]
    assert world.start()[1:] == [Start("w-3", "floor", awaited=False)]


def test_functions_take_turns_at_scarce_starts() -> None:
    world = World(max_starts=1, memory_mb=100_000)
    world.deploy("a")
    world.deploy("b")
    for _ in range(3):
        world.invoke("a")
    world.invoke("b")  # a's second is in line already, its third comes after b's first
    order = []
    while world.starting:
        order.append(next(iter(world.starting.values())))
        world.start()
    assert order == ["a", "a", "b", "a"]


def test_max_instances_counts_those_that_stop() -> None:
    world = World()
    world.deploy(max_instances=1)
    number = world.invoke()
    world.start()
    world.release(number, healthy=False)
    number = world.invoke()
    assert not world.starting
    assert world.stop() == [Start("w-2", "r", awaited=True)]


# --- memory -----------------------------------------------------------------------------------------------


def test_the_least_recently_used_makes_way_across_functions() -> None:
    world = two_full_of_idle()
    oldest = world.core._ledger.idle_by_rank(world.core._ledger.revisions["old"])[0].id
    world.deploy("new", memory_mb=200)
    actions = world.do_invoke("new")
    assert actions == [Stop(oldest, StopReason.EVICTED)]
    assert world.stop() == [Start("w-3", "new", awaited=True)]


def test_nothing_is_evicted_in_vain() -> None:
    world = two_full_of_idle()
    world.invoke("old", timeout_s=1000)
    world.deploy("new", memory_mb=400)
    assert world.do_invoke("new", timeout_s=1000) == []
    assert len(world.release(next(iter(world.granted)))) == 2, "now both can go"
    world.stop()
    assert world.stop() == [Start("w-3", "new", awaited=True)]


def test_floors_are_not_evicted() -> None:
    world = two_full_of_idle(min_instances=1)
    world.deploy("new", memory_mb=400)
    number = world.invoke("new", timeout_s=3.0)
    assert not world.stopping
    world.wait(3.0)
    assert world.rejected[number].reason is RejectReason.DEADLINE


def test_memory_that_is_being_freed_for_one_is_not_taken_by_another() -> None:
    world = two_full_of_idle()
    world.deploy("large", memory_mb=400)
    world.deploy("small", memory_mb=200)
    world.invoke("large", timeout_s=1000)
    assert len(world.stopping) == 2
    world.invoke("small", timeout_s=1000)
    assert world.stop() == []
    assert world.stop() == [Start("w-3", "large", awaited=True)]


def test_one_instance_larger_than_the_budget_is_refused_for_good() -> None:
    world = World(memory_mb=100)
    world.deploy(memory_mb=200, min_instances=1)
    refusal = world.rejected[world.invoke()]
    assert (refusal.reason, refusal.retry_after_s) == (RejectReason.NO_CAPACITY, None)
    assert "200 MB" in refusal.detail
    assert "100 MB" in refusal.detail


def test_a_floor_takes_the_memory_of_what_is_above_one() -> None:
    world = two_full_of_idle(keepalive="lru")
    world.deploy("floor", min_instances=2, memory_mb=200)
    assert len(world.stopping) == 2
    world.stop()
    world.stop()
    world.start_all()
    assert set(world.running.values()) == {"floor"}


def test_a_floor_that_lacks_memory_has_it_when_an_instance_falls_idle() -> None:
    world = two_full_of_idle(keepalive="lru")
    held = [world.invoke("old"), world.invoke("old")]
    world.deploy("floor", min_instances=1, memory_mb=200)
    assert not world.stopping
    world.release(held[0])
    world.wait(1.0)
    assert len(world.stopping) == 1
    assert world.stop() == [Start("w-3", "floor", awaited=False)]


# --- floors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze_after_s", [None, 0.0])
def test_a_floor_instance_that_dies_is_replaced_at_once(freeze_after_s: float | None) -> None:
    world = World()
    world.deploy(min_instances=1, freeze_after_s=freeze_after_s)
    world.start()
    assert world.die("w-1") == [Stop("w-1", StopReason.DIED), Start("w-2", "r", awaited=False)]
    assert world.stop() == []


def test_a_floor_counts_no_instance_that_takes_nothing_more() -> None:
    world = World(memory_mb=100_000)
    world.deploy(min_instances=1, slots=2)
    world.start()
    first, _ = world.invoke(), world.invoke()
    assert world.release(first, healthy=False) == [Start("w-2", "r", awaited=False)]


# --- failures ---------------------------------------------------------------------------------------------


def test_a_failed_start_refuses_who_waited_with_the_detail() -> None:
    world = World()
    world.deploy(max_instances=1)
    number = world.invoke()
    world.fail(detail="exit status 3: no such module")
    refusal = world.rejected[number]
    assert refusal.reason is RejectReason.START_FAILED
    assert refusal.detail == "exit status 3: no such module"
    assert refusal.retry_after_s == pytest.approx(1.0)
    assert not world.starting, "nobody waits any more"


def test_one_waiter_for_each_slot_that_the_start_would_have_given() -> None:
    world = World(max_starts=1)
    world.deploy(slots=2, max_instances=1)
    numbers = [world.invoke() for _ in range(5)]
    world.fail()
    assert [number in world.rejected for number in numbers] == [True, True, False, False, False]
    assert len(world.starting) == 1


def test_who_another_start_serves_is_not_refused() -> None:
    world = World()
    world.deploy()
    first, second = world.invoke(), world.invoke()
    del world.waiting[second]
    world.do(Abandoned(second))
    world.fail("w-1")
    assert first in world.waiting


def test_who_a_running_instance_serves_is_not_refused() -> None:
    world = World()
    world.deploy(max_instances=2)
    first = world.invoke()
    world.start()
    second = world.invoke()
    world.fail()
    assert second in world.waiting
    world.release(first)
    assert second in world.granted


def test_a_permanent_failure_refuses_everybody_and_opens_at_once() -> None:
    world = World()
    world.deploy(slots=1)
    numbers = [world.invoke() for _ in range(4)]
    world.fail(detail="no bootstrap", permanent=True)
    world.fail(detail="no bootstrap", permanent=True)
    assert {world.rejected[n].reason for n in numbers} == {RejectReason.START_FAILED}
    assert {world.rejected[n].retry_after_s for n in numbers} == {None}
    refusal = world.rejected[world.invoke()]
    assert (refusal.reason, refusal.detail) == (RejectReason.CRASH_LOOP, "no bootstrap")
    assert refusal.retry_after_s is not None
    assert refusal.retry_after_s > 100


def test_a_crash_loop_opens_the_breaker_and_backs_off_twice_as_long_each_time() -> None:
    world = World(breaker_failures=3, breaker_base_s=1.0, breaker_max_s=8.0)
    world.deploy(min_instances=1)
    for _ in range(2):
        world.fail()
        assert len(world.starting) == 1, "the first failures are tried again"
    waits = []
    for _ in range(5):
        world.fail()
        assert not world.starting
        before = world.now
        world.tick()
        assert len(world.starting) == 1, "half open: one"
        waits.append(world.now - before)
    for wait, full in zip(waits, (1, 2, 4, 8, 8), strict=True):
        assert 0.8 * full <= wait <= full


def test_an_open_breaker_refuses_until_half_open_lets_one_through() -> None:
    world = World(breaker_failures=1)
    world.deploy(max_instances=5)
    world.invoke()
    world.fail(detail="exit status 1")
    refusal = world.rejected[world.invoke(after_s=0.5)]
    assert (refusal.reason, refusal.detail) == (RejectReason.CRASH_LOOP, "exit status 1")
    stats = world.core.revision_stats("r")
    assert stats.breaker is BreakerState.OPEN
    assert stats.breaker_until is not None
    assert refusal.retry_after_s == pytest.approx(stats.breaker_until - world.now)
    world.wait(1.0)
    number, other = world.invoke(), world.invoke()
    assert len(world.starting) == 1
    assert world.core.revision_stats("r").breaker is BreakerState.HALF_OPEN
    world.start()
    assert number in world.granted
    assert other in world.waiting
    assert world.core.revision_stats("r").breaker is BreakerState.CLOSED
    assert len(world.starting) == 1, "closed: the next may start"


def test_an_open_breaker_does_not_keep_running_instances_from_serving() -> None:
    world = World(breaker_failures=1)
    world.deploy(max_instances=2)
    first = world.invoke()
    world.start()
    second = world.invoke()
    world.fail()
    third = world.invoke()
    assert third in world.waiting
    world.release(first)
    assert second in world.granted


def test_a_user_resets_the_breaker() -> None:
    world = World(breaker_failures=1)
    world.deploy(min_instances=1)
    world.fail()
    assert world.do(BreakerReset("r")) == [Start("w-2", "r", awaited=False)]


def test_instances_that_die_unused_after_each_start_do_not_spin() -> None:
    world = World(breaker_failures=3)
    world.deploy(min_instances=1)
    starts = 0
    until = world.now + 60.0
    while world.now < until:
        while world.starting:
            world.start(after_s=0.01)
            starts += 1
            world.die(next(iter(world.running)))
            world.stop()
        world.tick()
    assert 5 <= starts <= 10
    assert world.core.revision_stats("r").breaker_detail == "exit status 1"


def test_an_instance_that_served_and_then_died_is_no_failure() -> None:
    world = World(breaker_failures=1)
    world.deploy(min_instances=1)
    world.start()
    world.release(world.invoke())
    world.die("w-1")
    assert len(world.starting) == 1


# --- the backend ------------------------------------------------------------------------------------------


def test_the_backends_faults_do_not_count_against_the_revision_but_do_not_spin_either() -> None:
    world = World(breaker_failures=2)
    world.deploy(min_instances=1)
    world.fail(backend_fault=True)
    world.fail(backend_fault=True)
    assert not world.starting
    assert world.core.revision_stats("r").breaker is BreakerState.CLOSED
    assert world.core.next_deadline() <= world.now + 1.0
    assert world.tick() == [Start("w-3", "r", awaited=False)]


def test_a_backend_that_is_down_starts_nothing_and_says_so() -> None:
    world = World()
    world.deploy("a", min_instances=1)
    world.deploy("b")
    world.start()
    waits = world.invoke("b")
    world.do(BackendDown("connection refused"))
    world.fail(backend_fault=True, detail="connection refused")
    assert waits in world.rejected
    refusal = world.rejected[world.invoke("b")]
    assert (refusal.reason, refusal.detail) == (RejectReason.BACKEND_DOWN, "connection refused")
    assert refusal.retry_after_s is not None
    first, second = world.invoke("a"), world.invoke("a")
    assert first in world.granted, "what runs, serves"
    assert second in world.waiting
    world.release(first)
    assert second in world.granted
    assert not world.starting
    world.die("w-1")
    world.release(second)
    assert not world.starting
    assert world.do(BackendUp()) == [Start("w-3", "a", awaited=False)]


def test_the_waiters_of_a_revision_with_nothing_left_are_refused_when_the_backend_goes() -> None:
    world = World(max_starts=1)
    world.deploy("a")
    world.deploy("b")
    world.invoke("a")
    waits = world.invoke("b")
    actions = world.do(BackendDown("gone"))
    assert [(type(a), getattr(a, "invocation", None)) for a in actions] == [(Reject, waits)]


def test_a_start_that_died_before_it_ended_is_not_used() -> None:
    world = World()
    world.deploy(max_instances=1)
    number = world.invoke()
    assert world.die("w-1") == []
    assert Stop("w-1", StopReason.DIED) in world.start()
    world.stop()
    world.start()
    assert world.kinds[number] is StartKind.COLD


def test_a_closed_breaker_leaves_no_timer() -> None:
    world = World(breaker_failures=1)
    world.deploy(min_instances=1, freeze_after_s=None, keepalive="lru")
    world.fail()
    world.tick()
    world.start()
    assert world.core.next_deadline() == math.inf
