"""Deploy, remove, scale, drain; limits and specs that cannot be."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from scheduler_world import World

from scheduler.core import Scheduler
from scheduler.errors import ConfigurationError, InvariantError
from scheduler.messages import CancelStart, Drained, Removed, Scaled, Start, Started, Stop
from scheduler.model import HostLimits, RejectReason, StartKind, StopReason


def test_deploying_fills_the_floor() -> None:
    world = World()
    assert world.deploy(min_instances=1) == [Start("w-1", "r", awaited=False)]
    with pytest.raises(InvariantError, match="deployed already"):
        world.deploy()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"slots": 0}, "slots is 0, at least 1"),
        ({"min_instances": -1}, "min_instances is -1"),
        ({"min_instances": 5, "max_instances": 2}, "min_instances 5 is more than max_instances 2"),
        ({"memory_mb": 0}, "memory_mb is 0"),
        ({"queue_max": -1}, "queue_max is -1"),
        ({"freeze_after_s": -1.0}, "freeze_after_s is -1.0"),
        ({"keepalive_s": math.nan}, "keepalive_s is nan"),
        ({"max_age_s": 0.0}, "max_age_s is 0.0, more than 0"),
        ({"max_uses": 0}, "max_uses is 0"),
        ({"keepalive": "magic"}, "unknown keep-alive policy 'magic': known are lru, ttl"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(spec: dict[str, Any], says: str) -> None:
    world = World()
    with pytest.raises(ConfigurationError, match=says):
        world.deploy(**spec)
    assert world.core.revisions() == []
    assert not world.core._ledger.functions
    assert not world.core._ledger.tenants


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"memory_mb": 0}, "memory_mb is 0"),
        ({"max_starts": 0, "max_concurrency": -1}, "max_concurrency is -1.*max_starts is 0"),
        ({"breaker_base_s": 5.0, "breaker_max_s": 1.0}, "breaker_base_s"),
        ({"tenant_overrides": {"t": -1}}, "limit t is -1"),
        ({"journal_entries": -1}, "journal_entries is -1"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Scheduler(HostLimits(**limits), epoch="e", rng=random.Random(0))


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(InvariantError, match="no event"):
        World().core.handle("Invoked", 0.0)  # type: ignore[arg-type]  # that is the point


# --- removing ---------------------------------------------------------------------------------------------


def mixed() -> World:
    """r with an idle, a frozen, a busy and a starting instance, and nobody waiting."""
    world = World(max_starts=9, memory_mb=100_000)
    world.deploy(min_instances=3, max_instances=4, freeze_after_s=1.0)
    world.start_all()
    first, second = world.invoke(), world.invoke()
    world.wait(1.0)
    world.release(first)
    world.do(Scaled("r", min_instances=4))
    assert second in world.granted
    return world


def test_removed_idle_ones_stop_starts_are_given_up_and_busy_ones_end_their_work() -> None:
    world = mixed()
    actions = world.do(Removed("r"))
    assert sorted(map(str, actions)) == sorted(
        map(
            str,
            [
                Stop("w-1", StopReason.REMOVED),
                Stop("w-3", StopReason.REMOVED),
                CancelStart("w-4", StopReason.REMOVED),
            ],
        )
    )
    refused = world.invoke()
    assert world.rejected[refused].reason is RejectReason.UNKNOWN_REVISION
    assert world.release(2) == [Stop("w-2", StopReason.REMOVED)]
    while world.stopping:
        world.stop()
    ledger = world.core._ledger
    assert not ledger.retired
    assert not ledger.functions
    assert not ledger.tenants
    assert not ledger.instances
    assert not ledger.hungry
    assert not ledger.refill
    assert world.core.next_deadline() == math.inf


def test_removed_refuses_its_queue() -> None:
    world = World()
    world.deploy()
    number = world.invoke()
    world.do(Removed("r"))
    assert world.rejected[number].reason is RejectReason.REMOVED


def test_replaced_hands_its_queue_over_in_order_of_arrival() -> None:
    world = World(max_starts=9)
    world.deploy("v1", function="f", max_instances=1)
    world.deploy("v2", function="f", max_instances=1)
    first = world.invoke("v1")
    second = world.invoke("v2")
    third = world.invoke("v1")
    world.waiting.update({first: "v2", third: "v2"})
    world.do(Removed("v1", replaced_by="v2"))
    world.start("w-2")
    order = []
    while world.granted:
        (number,) = world.granted
        order.append(number)
        world.release(number)
    assert order == [first, second, third]
    assert world.kinds[first] is StartKind.COLD


def test_replaced_the_queue_stays_bounded() -> None:
    world = World(max_starts=1)
    world.deploy("v1", function="f", max_instances=1, queue_max=3)
    world.deploy("v2", function="f", max_instances=1, queue_max=3)
    old = [world.invoke("v1") for _ in range(4)]
    new = [world.invoke("v2") for _ in range(3)]
    world.waiting.update(dict.fromkeys(old, "v2"))
    world.do(Removed("v1", replaced_by="v2"))
    assert set(world.waiting) == set(old), "the oldest stay"
    assert {world.rejected[number].reason for number in new} == {RejectReason.QUEUE_FULL}


def test_replaced_serves_the_queue_at_once_from_a_warm_heir() -> None:
    world = World()
    world.deploy("v1", function="f", max_instances=1)
    world.deploy("v2", function="f", min_instances=1)
    world.start("w-1")
    running, waits = world.invoke("v1"), world.invoke("v1")
    world.start("w-2")
    assert {running, waits} & world.waiting.keys()
    for number in list(world.waiting):
        world.waiting[number] = "v2"
    world.do(Removed("v1", replaced_by="v2"))
    assert not world.waiting


def test_an_heir_must_be_there() -> None:
    world = World()
    world.deploy()
    with pytest.raises(InvariantError):
        world.do(Removed("r", replaced_by="nothing"))
    with pytest.raises(InvariantError):
        world.do(Removed("r", replaced_by="r"))
    assert world.core.revisions() == ["r"]


def test_rolled_back_while_the_old_instances_still_end() -> None:
    world = World()
    world.deploy(min_instances=1)
    world.start()
    number = world.invoke()
    world.do(Removed("r"))
    world.deploy(min_instances=1)
    world.start("w-2")
    assert len(world.core.instances("r")) == 2
    assert world.release(number) == [Stop("w-1", StopReason.REMOVED)]
    world.stop()
    assert world.granted[world.invoke()] == "w-2"


def test_a_start_that_ends_after_it_was_given_up_is_stopped() -> None:
    world = World()
    world.deploy(min_instances=1)
    world.do(Removed("r"))
    world.running["w-1"] = world.stopping.pop("w-1")
    assert world.do(Started("w-1")) == [Stop("w-1", StopReason.REMOVED)]
    world.stop()
    assert not world.core._ledger.retired


def test_a_start_that_fails_after_it_was_given_up_is_over() -> None:
    world = World()
    world.deploy(min_instances=1)
    world.do(Removed("r"))
    world.starting["w-1"] = world.stopping.pop("w-1")
    world.fail()
    assert not world.core._ledger.retired


# --- scaling ----------------------------------------------------------------------------------------------


def test_scaling_up_starts() -> None:
    world = World(max_starts=5)
    world.deploy()
    assert world.do(Scaled("r", min_instances=2)) == [
        Start("w-1", "r", awaited=False),
        Start("w-2", "r", awaited=False),
    ]


def test_scaling_down_stops_idle_ones_now_and_busy_ones_as_they_fall_idle() -> None:
    world = World(max_starts=5)
    world.deploy(max_instances=4, min_instances=4, freeze_after_s=None)
    world.start_all()
    busy = [world.invoke(), world.invoke()]
    actions = world.do(Scaled("r", min_instances=0, max_instances=1))
    assert [action.reason for action in actions if isinstance(action, Stop)] == [StopReason.SURPLUS] * 2
    assert world.release(busy[0]) == [Stop("w-4", StopReason.SURPLUS)]
    assert world.release(busy[1]) == []


def test_scaling_down_gives_up_starts() -> None:
    world = World(max_starts=5)
    world.deploy(min_instances=2)
    assert world.do(Scaled("r", 1, 1)) == [CancelStart("w-2", StopReason.SURPLUS)]


def test_scaling_to_nothing_refuses_who_waits() -> None:
    world = World()
    world.deploy()
    number = world.invoke()
    world.do(Scaled("r", 0, 0))
    assert world.rejected[number].reason is RejectReason.CONCURRENCY_LIMIT


def test_a_scale_that_cannot_be_is_refused() -> None:
    world = World()
    world.deploy(min_instances=1, max_instances=2)
    with pytest.raises(ConfigurationError, match="more than max_instances 2"):
        world.do(Scaled("r", min_instances=3))
    with pytest.raises(ConfigurationError, match="-1 instances"):
        world.do(Scaled("r", max_instances=-1))
    assert world.core.revision_stats("r").min_instances == 1


# --- draining ---------------------------------------------------------------------------------------------


def test_draining_ends_what_runs_and_stops_the_rest() -> None:
    world = mixed()
    waits = [world.invoke() for _ in range(9)]
    queued = [number for number in waits if number in world.waiting]
    world.do(Drained())
    assert {world.rejected[number].reason for number in queued} == {RejectReason.DRAINING}
    refusal = world.rejected[world.invoke()]
    assert refusal.reason is RejectReason.DRAINING
    assert refusal.retry_after_s is not None
    for number in list(world.granted):
        (stop,) = world.release(number)
        assert isinstance(stop, Stop)
        assert stop.reason is StopReason.DRAINING
    while world.stopping:
        assert world.stop() == []
    assert world.core.instances() == []
    assert world.core.next_deadline() == math.inf


def test_draining_with_keep_leaves_idle_ones_to_the_next_daemon() -> None:
    world = mixed()
    assert world.do(Drained(keep=True)) == [CancelStart("w-4", StopReason.DRAINING)]
    world.stop()
    assert world.release(2) == []
    assert len(world.running) == 3
    assert world.core.next_deadline() == math.inf
    world.die("w-1")
    assert world.stop() == [], "nothing is started any more"
    assert len(world.do(Drained())) == 2, "and they can still be stopped"


def test_views() -> None:
    world = mixed()
    stats = world.core.revision_stats("r")
    assert stats.running == 1
    assert {state.value: n for state, n in stats.instances.items() if n} == {
        "idle": 1, "busy": 1, "frozen": 1, "starting": 1,
    }  # fmt: skip
    assert sum(stats.totals.values()) == 2
    assert stats.service_s is not None
    host = world.core.host_stats()
    assert (host.instances, host.running, host.memory_charged_mb) == (4, 1, 4 * 256)
    assert [view.id for view in world.core.instances("r")] == ["w-1", "w-2", "w-3", "w-4"]
    with pytest.raises(KeyError):
        world.core.revision_stats("nothing")
    world.do(Removed("r"))
    (ending,) = world.core.retired_stats()
    assert ending.removed
