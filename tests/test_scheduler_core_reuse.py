"""Which slot an invocation gets, and what its start is called."""

from __future__ import annotations

import pytest
from scheduler_world import World

from scheduler.errors import InvariantError
from scheduler.messages import Freeze, Grant, Invoked, Released, Stop
from scheduler.model import RejectReason, StartKind, StopReason


def pool(n: int, **spec: object) -> World:
    """A world with a pool of n started, idle instances w-1 ... w-n."""
    world = World(max_starts=50, memory_mb=100_000)
    world.deploy(min_instances=n, max_instances=n, **{"freeze_after_s": None, **spec})
    world.start_all()
    return world


def test_the_grant_comes_in_the_same_call() -> None:
    world = pool(1)
    assert world.do_invoke() == [Grant(1, "w-1", StartKind.PREWARMED, thaw=False)]
    world.release(1)
    assert world.do_invoke() == [Grant(2, "w-1", StartKind.WARM, thaw=False)]


def test_most_recently_used_first() -> None:
    world = pool(3)
    first, second, third = world.invoke(), world.invoke(), world.invoke()
    used = [world.granted[n] for n in (first, second, third)]
    world.release(second, 1.0)
    world.release(first, 1.0)
    world.release(third, 1.0)
    again = [world.granted[world.invoke()] for _ in range(3)]
    assert again == [used[2], used[0], used[1]]


def test_a_frozen_one_only_when_no_running_one_is_idle() -> None:
    world = pool(2, freeze_after_s=1.0)
    kept = world.invoke()
    world.wait(1.5)
    world.release(kept)
    assert world.core.instance_view("w-1").state == "frozen"
    assert world.do_invoke() == [Grant(2, "w-2", StartKind.WARM, thaw=False)]
    assert world.do_invoke() == [Grant(3, "w-1", StartKind.PREWARMED, thaw=True)]
    world.release(3)
    world.wait(1.5)
    assert world.do_invoke() == [Grant(4, "w-1", StartKind.THAWED, thaw=True)]


def test_one_instance_fills_before_the_next() -> None:
    world = pool(2, slots=3)
    grants = [world.granted[world.invoke()] for _ in range(6)]
    assert grants == ["w-2"] * 3 + ["w-1"] * 3


def test_the_fullest_is_filled_first_so_that_the_other_can_rest() -> None:
    world = pool(2, slots=4)
    invocations = [world.invoke() for _ in range(8)]
    for number in invocations[:1] + invocations[4:7]:  # three left in w-2, one in w-1
        world.release(number)
    assert [world.granted[world.invoke()] for _ in range(2)] == ["w-2", "w-1"]


def test_a_waiter_for_its_start_is_cold_and_the_next_use_warm() -> None:
    world = World()
    world.deploy()
    first = world.invoke()
    assert list(world.starting) == ["w-1"]
    world.start()
    assert world.kinds[first] is StartKind.COLD
    world.release(first)
    assert world.kinds[world.invoke()] is StartKind.WARM


def test_all_slots_of_a_start_that_was_waited_for_are_cold() -> None:
    world = World()
    world.deploy(slots=2, max_instances=1)
    first, second = world.invoke(), world.invoke()
    world.start()
    assert [world.kinds[n] for n in (first, second)] == [StartKind.COLD] * 2


def test_a_waiter_that_anothers_release_serves_is_warm() -> None:
    world = World()
    world.deploy(max_instances=2)
    world.invoke()
    world.start()
    second = world.invoke()
    assert world.starting  # its own start is under way, but the release is sooner
    world.release(1, 0.01)
    assert world.kinds[second] is StartKind.WARM
    world.start()
    third = world.invoke()
    assert (world.granted[third], world.kinds[third]) == ("w-2", StartKind.PREWARMED)


def test_a_lease_that_ended_unused_leaves_the_instance_unused() -> None:
    world = pool(1)
    world.release(world.invoke(), used=False)
    again = world.invoke()
    assert world.kinds[again] is StartKind.PREWARMED
    assert world.core.instance_view("w-1").uses == 1


def test_an_unhealthy_instance_stops() -> None:
    world = pool(1)
    assert Stop("w-1", StopReason.BROKEN) in world.release(world.invoke(), healthy=False)


def test_an_unhealthy_instance_with_other_leases_takes_no_more_and_stops_with_the_last() -> None:
    world = pool(1, slots=3)
    first, second = world.invoke(), world.invoke()
    assert world.release(first, healthy=False) == []
    third = world.invoke()
    assert third in world.waiting
    assert Stop("w-1", StopReason.BROKEN) in world.release(second)


def test_freezing_at_once_waits_for_nobody() -> None:
    world = pool(1, freeze_after_s=0)
    assert world.core.instance_view("w-1").state == "frozen"
    first, second = world.invoke(), world.invoke()
    assert Freeze("w-1") not in world.release(first), "somebody waits"
    assert world.release(second) == [Freeze("w-1")]


def test_what_cannot_be() -> None:
    world = pool(1)
    number = world.invoke()
    for event in (Invoked(number, "r", 1e9), Released(99)):
        with pytest.raises(InvariantError):
            world.do(event)
    unknown = world.invoke("nothing")
    assert world.rejected[unknown].reason is RejectReason.UNKNOWN_REVISION
    assert world.rejected[unknown].retry_after_s is None
