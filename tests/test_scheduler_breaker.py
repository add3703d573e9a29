"""The breaker by itself, and the estimates."""

from __future__ import annotations

import pytest

from scheduler.breaker import Breaker, BreakerState
from scheduler.history import Estimate
from scheduler.keepalive import REGISTRY, IdleFacts
from scheduler.model import RevisionSpec


def high() -> float:
    return 1.0


def opened(opens: int) -> Breaker:
    breaker = Breaker(threshold=1, base_s=1.0, max_s=300.0)
    now = 0.0
    for _ in range(opens):
        breaker.failed(now, "x", high)
        now = breaker.until
    return breaker


def test_closed_below_its_threshold() -> None:
    breaker = Breaker(threshold=3, base_s=1.0, max_s=300.0)
    breaker.failed(0.0, "x", high)
    breaker.failed(0.0, "x", high)
    assert breaker.state(0.0) is BreakerState.CLOSED
    assert not breaker.blocks(0.0, 5)
    breaker.failed(0.0, "x", high)
    assert breaker.state(0.0) is BreakerState.OPEN


@pytest.mark.parametrize(("opens", "back_off_s"), [(1, 1.0), (2, 2.0), (5, 16.0), (9, 256.0), (10, 300.0), (60, 300.0)])
def test_back_off_doubles_up_to_its_limit(opens: int, back_off_s: float) -> None:
    before, last = opened(opens - 1), opened(opens)
    start = before.until if opens > 1 else 0.0
    assert last.until - start == pytest.approx(back_off_s)


@pytest.mark.parametrize(("draw", "back_off_s"), [(0.0, 0.8), (0.5, 0.9), (0.999, 0.9998)])
def test_chance_spreads_the_back_off(draw: float, back_off_s: float) -> None:
    breaker = Breaker(threshold=1, base_s=1.0, max_s=300.0)
    breaker.failed(0.0, "x", lambda: draw)
    assert breaker.until == pytest.approx(back_off_s)


def test_half_open_lets_one_through() -> None:
    breaker = opened(1)
    assert breaker.blocks(0.5, 0)
    assert breaker.state(1.0) is BreakerState.HALF_OPEN
    assert not breaker.blocks(1.0, 0)
    assert breaker.blocks(1.0, 1)


def test_starts_from_before_the_opening_do_not_prolong_it() -> None:
    breaker = opened(1)
    breaker.failed(0.1, "another", high)
    assert (breaker.until, breaker.opens) == (1.0, 1)
    assert breaker.detail == "another"


def test_a_permanent_failure_opens_at_once_for_the_longest_time() -> None:
    breaker = Breaker(threshold=3, base_s=1.0, max_s=300.0)
    breaker.failed(0.0, "no image", high, permanent=True)
    assert breaker.until == 300.0
    assert breaker.permanent


def test_closing_forgets() -> None:
    breaker = opened(4)
    breaker.close()
    assert breaker.state(0.0) is BreakerState.CLOSED
    breaker.failed(100.0, "x", high)
    assert breaker.until == pytest.approx(101.0)


def test_an_estimate_begins_with_its_first_sample_and_follows_the_newest() -> None:
    estimate = Estimate()
    assert estimate.value_s is None
    estimate.add(1.0)
    assert estimate.value_s == 1.0
    for _ in range(50):
        estimate.add(3.0)
    assert estimate.value_s == pytest.approx(3.0, abs=0.01)
    assert estimate.samples == 51


def test_policies() -> None:
    spec = RevisionSpec(revision="r", function="f", keepalive_s=60.0)
    assert REGISTRY["ttl"].keep_s(spec) == 60.0
    assert REGISTRY["lru"].keep_s(spec) == float("inf")
    old, new = IdleFacts(1.0, 9, 100), IdleFacts(2.0, 1, 100)
    for policy in REGISTRY.values():
        assert policy.rank(old) < policy.rank(new)
