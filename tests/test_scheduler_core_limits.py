"""Concurrency limits, queues, deadlines and early refusals."""

from __future__ import annotations

import math

import pytest
from scheduler_world import World

from scheduler.errors import ConfigurationError
from scheduler.messages import Abandoned, Reject, Removed, Scaled, Start
from scheduler.model import RejectReason, StartKind


def world_of(*functions: str, limits: dict[str, object] | None = None, **spec: object) -> World:
    """Functions with two started instances each."""
    world = World(**{"max_starts": 50, "memory_mb": 100_000, **(limits or {})})
    for name in functions:
        world.deploy(name, **{"min_instances": 2, "max_instances": 2, "freeze_after_s": None, **spec})
    world.start_all()
    return world


def serve(world: World, revision: str, seconds: float) -> None:
    """One measured invocation."""
    number = world.invoke(revision)
    if number in world.waiting:
        world.start(after_s=2.0)
    world.release(number, seconds)


# --- limits -----------------------------------------------------------------------------------------------


def test_the_host_limit_queues_and_the_next_release_serves() -> None:
    world = world_of("a", "b", limits={"max_concurrency": 2})
    first, second, third = world.invoke("a"), world.invoke("a"), world.invoke("b")
    assert third in world.waiting
    assert not world.starting, "a start would not help"
    world.release(first)
    assert world.granted[third].startswith("w-")
    assert second in world.granted


def test_functions_take_turns_at_the_host_limit() -> None:
    world = world_of("a", "b", "c", limits={"max_concurrency": 1})
    running = world.invoke("a")
    order = [world.invoke(name) for name in ("a", "a", "a", "b", "b", "c")]
    served = []
    for _ in order:
        world.release(running)
        running = next(iter(world.granted))
        served.append(world.core._ledger.leases[running][0].revision.spec.revision)
    assert served == ["a", "b", "c", "a", "b", "a"]


def test_a_backlog_never_blocks_anothers_free_instance() -> None:
    world = world_of("a", "b")
    for _ in range(20):
        world.invoke("a")
    number = world.invoke("b")
    assert number in world.granted


def test_a_tenants_limit_holds_for_all_its_functions_and_for_nobody_else() -> None:
    world = World(max_starts=50, tenant_concurrency=2, tenant_overrides={"big": 3}, memory_mb=100_000)
    for name, tenant in (("a", "small"), ("b", "small"), ("c", "big")):
        world.deploy(name, tenant=tenant, min_instances=4, max_instances=4, freeze_after_s=None)
    world.start_all()
    first, _, third = world.invoke("a"), world.invoke("b"), world.invoke("b")
    assert third in world.waiting
    others = [world.invoke("c") for _ in range(4)]
    assert [number in world.granted for number in others] == [True, True, True, False]
    world.release(first)
    assert third in world.granted
    assert others[3] in world.waiting


def test_reserved_capacity_is_kept_free_and_its_owner_may_have_more() -> None:
    world = World(max_starts=50, max_concurrency=4, memory_mb=100_000)
    world.deploy("vip", reserved=2, min_instances=4, max_instances=4)
    world.deploy("other", min_instances=4, max_instances=4)
    world.start_all()
    others = [world.invoke("other") for _ in range(3)]
    assert [number in world.granted for number in others] == [True, True, False]
    vips = [world.invoke("vip") for _ in range(3)]
    assert [number in world.granted for number in vips] == [True, True, False]
    world.release(vips[0])
    assert others[2] in world.waiting, "what vip gives back stays vip's"
    assert vips[2] in world.granted
    world.release(others[0])
    assert others[2] in world.granted


def test_what_is_reserved_late_is_had_as_soon_as_the_host_has_room() -> None:
    world = World(max_starts=50, max_concurrency=2, memory_mb=100_000)
    world.deploy("other", min_instances=2, max_instances=2)
    world.start_all()
    others = [world.invoke("other"), world.invoke("other")]
    world.deploy("vip", reserved=1, min_instances=1)
    world.start_all()
    more, vip = world.invoke("other"), world.invoke("vip")
    assert {more, vip} == set(world.waiting)
    world.release(others[0])
    assert vip in world.granted
    world.release(others[1])
    assert more in world.granted


def test_reserving_more_than_there_is_is_refused() -> None:
    world = World(max_concurrency=4)
    world.deploy("a", reserved=3)
    with pytest.raises(ConfigurationError, match="only 1 are not reserved"):
        world.deploy("b", reserved=2)
    world.deploy("a2", function="a", reserved=4)  # a new revision of the same function takes its place


def test_a_function_that_others_reserves_leave_nothing_is_told_so() -> None:
    world = World(max_concurrency=2)
    world.deploy("a", reserved=2)
    world.deploy("b")
    refusal = world.rejected[world.invoke("b")]
    assert refusal.reason is RejectReason.CONCURRENCY_LIMIT
    assert "reserved" in refusal.detail
    world.do(Removed("a"))
    assert world.invoke("b") in world.waiting


def test_starts_are_made_for_no_more_than_may_run() -> None:
    world = World(max_starts=50, max_concurrency=3, memory_mb=100_000)
    world.deploy(max_instances=10)
    for _ in range(8):
        world.invoke()
    assert len(world.starting) == 3


# --- queue and deadlines ----------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    world = world_of("a", min_instances=1, max_instances=1)
    running = world.invoke("a")
    waiting = [world.invoke("a") for _ in range(3)]
    for number in waiting:
        world.release(running)
        assert list(world.granted) == [number]
        running = number


def test_a_full_queue_says_when_to_come_back() -> None:
    world = world_of("a", min_instances=1, max_instances=1, queue_max=2)
    serve(world, "a", 4.0)
    numbers = [world.invoke("a", timeout_s=1000) for _ in range(4)]
    refusal = world.rejected[numbers[3]]
    assert refusal.reason is RejectReason.QUEUE_FULL
    assert refusal.retry_after_s == pytest.approx(12.0)  # three in line at 4 s each
    assert "2 invocations are queued already" in refusal.detail


def test_those_a_start_will_serve_are_not_counted_as_queued() -> None:
    world = World(max_starts=1)
    world.deploy(queue_max=1, max_instances=1)
    numbers = [world.invoke() for _ in range(3)]
    assert [number in world.waiting for number in numbers] == [True, True, False]


def test_without_a_queue_a_start_of_its_own_may_be_waited_for_and_nothing_else() -> None:
    world = World()
    world.deploy(queue_max=0, max_instances=1)
    first, second = world.invoke(), world.invoke()
    assert first in world.waiting
    assert world.rejected[second].reason is RejectReason.CONCURRENCY_LIMIT
    world.start()
    third = world.invoke()
    assert world.rejected[third].reason is RejectReason.CONCURRENCY_LIMIT
    assert world.rejected[third].retry_after_s is not None


def test_a_deadline_is_kept_to_the_instant() -> None:
    world = world_of("a", min_instances=1, max_instances=1)
    running = world.invoke("a", timeout_s=1.0)
    number = world.invoke("a", timeout_s=1.0)
    assert world.core.next_deadline() == world.now + 1.0
    refusals = world.tick()
    assert isinstance(refusals[0], Reject)
    assert (refusals[0].invocation, refusals[0].reason) == (number, RejectReason.DEADLINE)
    assert running in world.granted, "the deadline is for the queue, not for the run"


def test_a_slot_that_comes_free_at_the_deadline_is_too_late() -> None:
    world = world_of("a", min_instances=1, max_instances=1)
    running = world.invoke("a")
    number = world.invoke("a", timeout_s=1.0)
    world.release(running, 1.0)
    assert world.rejected[number].reason is RejectReason.DEADLINE


def test_no_time_to_wait_is_no_reason_to_refuse_a_free_slot() -> None:
    world = world_of("a", min_instances=1, max_instances=1)
    assert world.invoke("a", timeout_s=0.0) in world.granted
    refusal = world.rejected[world.invoke("a", timeout_s=0.0)]
    assert refusal.reason is RejectReason.DEADLINE


def test_who_goes_away_is_forgotten() -> None:
    world = world_of("a", min_instances=1, max_instances=1)
    running = world.invoke("a")
    number = world.invoke("a")
    del world.waiting[number]
    assert world.do(Abandoned(number)) == []
    assert world.release(running) == []
    assert world.core.next_deadline() > world.now + 500, "nothing but keep-alive is due"


# --- starts only when they help, and early refusals -----------------------------------------------------------


def measured(service_s: float, **spec: object) -> World:
    """One instance running, start measured at 2 s, service at `service_s`; two more may start."""
    world = World(max_starts=5, memory_mb=100_000)
    world.deploy(freeze_after_s=None, **{"max_instances": 3, **spec})
    serve(world, "r", service_s)
    return world


def test_no_start_where_the_queue_drains_sooner() -> None:
    world = measured(0.1)
    running = world.invoke()
    number = world.invoke()
    assert not world.starting
    world.release(running, 0.1)
    assert world.kinds[number] is StartKind.WARM


def test_a_start_where_the_queue_drains_later() -> None:
    world = measured(0.1)
    world.invoke()
    numbers = [world.invoke(timeout_s=100) for _ in range(19)]
    assert not world.starting, "19 times 0.1 s is less than the 2 s of a start"
    numbers += [world.invoke(timeout_s=100) for _ in range(2)]
    assert len(world.starting) == 1, "one, after which the rest drains sooner again"
    assert all(number in world.waiting for number in numbers)


def test_where_the_prediction_was_wrong_the_start_is_made() -> None:
    world = measured(0.1)
    world.invoke()  # and it runs on and on
    world.invoke(timeout_s=60)
    assert not world.starting
    assert world.core.next_deadline() == world.now + 2.0
    assert [type(action) for action in world.tick()] == [Start]


def test_nothing_runs_so_a_start_is_made() -> None:
    world = measured(0.1, max_uses=1)
    while world.stopping:
        world.stop()
    world.invoke()
    assert world.starting


def test_refused_early_when_queue_and_start_take_too_long() -> None:
    world = measured(4.0, max_instances=1)
    world.invoke()
    waits = world.invoke(timeout_s=5.0)
    refusal = world.rejected[world.invoke(timeout_s=5.0)]
    assert waits in world.waiting
    assert refusal.reason is RejectReason.WOULD_MISS_DEADLINE
    assert refusal.retry_after_s == pytest.approx(3.0)  # 8 s of queue, less its own 5
    assert "8.000 s" in refusal.detail


def test_what_has_run_already_is_not_waited_for_again() -> None:
    world = measured(60.0, max_instances=1)
    world.invoke()
    assert world.invoke(timeout_s=30.0) in world.rejected
    assert world.invoke(timeout_s=30.0, after_s=31.0) in world.waiting


def test_nothing_measured_nothing_refused_early() -> None:
    world = World()
    world.deploy(max_instances=1)
    assert world.invoke(timeout_s=0.001) in world.waiting
    world.invoke(timeout_s=60.0)
    world.start()
    assert world.invoke(timeout_s=0.001) in world.waiting


def test_who_is_refused_early_for_a_start_still_sets_it_going() -> None:
    world = measured(0.1, keepalive_s=1.0)
    world.wait(10.0)
    while world.stopping:
        world.stop()
    refusal = world.rejected[world.invoke(timeout_s=0.5)]
    assert refusal.reason is RejectReason.WOULD_MISS_DEADLINE
    assert refusal.retry_after_s == pytest.approx(1.5)
    world.start(after_s=1.5)
    number = world.invoke(timeout_s=0.5)
    assert world.kinds[number] is StartKind.PREWARMED


def test_a_start_under_way_counts_with_the_time_it_has_left() -> None:
    world = measured(0.1, keepalive_s=1.0)
    world.wait(10.0)
    while world.stopping:
        world.stop()
    world.invoke(timeout_s=3.0)
    assert world.invoke(timeout_s=1.0, after_s=1.5) in world.waiting


def test_max_instances_zero_pauses_a_function() -> None:
    world = world_of("a")
    world.do(Scaled("a", 0, 0))
    refusal = world.rejected[world.invoke("a")]
    assert (refusal.reason, refusal.retry_after_s) == (RejectReason.CONCURRENCY_LIMIT, None)


def test_without_anything_due_there_is_no_deadline() -> None:
    assert world_of("a", keepalive="lru").core.next_deadline() == math.inf
