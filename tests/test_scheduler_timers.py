"""The heap of what is due: lazy, bounded, exact."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import given

from scheduler.records import Timed
from scheduler.timers import SLACK, Timers


def test_the_earliest_fires_first_and_once() -> None:
    timers = Timers()
    late, early = Timed(), Timed()
    timers.arm(late, 2.0)
    timers.arm(early, 1.0)
    assert timers.next_at() == 1.0
    assert timers.pop_due(0.9) is None
    assert timers.pop_due(5.0) is early
    assert timers.pop_due(5.0) is late
    assert timers.pop_due(5.0) is None
    assert timers.next_at() == math.inf


def test_a_later_time_keeps_the_entry_and_an_earlier_one_replaces_it() -> None:
    timers = Timers()
    owner = Timed()
    timers.arm(owner, 2.0)
    timers.arm(owner, 3.0)
    assert timers.next_at() == 2.0
    timers.arm(owner, 1.0)
    assert timers.pop_due(10.0) is owner
    assert timers.pop_due(10.0) is None


def test_never_is_no_entry() -> None:
    timers = Timers()
    timers.arm(Timed(), math.inf)
    assert timers.heap == []


def test_disarmed_does_not_fire() -> None:
    timers = Timers()
    owner = Timed()
    timers.arm(owner, 1.0)
    timers.disarm(owner)
    timers.disarm(owner)
    assert timers.next_at() == math.inf
    timers.arm(owner, 4.0)
    assert timers.pop_due(4.0) is owner


def test_stale_entries_do_not_pile_up() -> None:
    timers = Timers()
    kept = Timed()
    timers.arm(kept, 1e9)
    for n in range(10_000):
        owner = Timed()
        timers.arm(owner, 1000.0 + n)
        timers.disarm(owner)
        assert len(timers.heap) <= 2 * SLACK + 4
    assert timers.pop_due(1e9) is kept


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 50)))))
def test_against_a_plain_table(steps: list[tuple[int, int | None]]) -> None:
    timers = Timers()
    owners = [Timed() for _ in range(6)]
    table: dict[int, int] = {}
    for which, at in steps:
        if at is None:
            timers.disarm(owners[which])
            table.pop(which, None)
        else:
            timers.arm(owners[which], at)
            table[which] = min(at, table.get(which, at))
        assert timers.next_at() == min(table.values(), default=math.inf)
    fired = []
    while (owner := timers.pop_due(math.inf)) is not None:
        fired.append(table[owners.index(owner)])
    assert fired == sorted(table.values())
