"""The Prometheus text: right, grouped, and made in pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from gateway_fake_parts import Parts, fake_view

from gateway.metrics import BUCKETS_S, FUNCTION_ERROR, OK, FunctionGauges, HostGauges, Metrics, render
from scheduler.model import InstanceState, StartKind


@pytest.fixture
def parts(nursery: trio.Nursery) -> Parts:
    return Parts(nursery)


async def _text(chunks: AsyncIterator[bytes]) -> str:
    return b"".join([chunk async for chunk in chunks]).decode()


def _samples(text: str) -> dict[str, float]:
    """Sample name with labels -> value; checks the format's rules on the way."""
    found: dict[str, float] = {}
    family, seen = "", set()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            assert family not in seen, "a family's samples stand together"
            seen.add(family)
        elif line.startswith("# TYPE "):
            assert line.split(" ")[2] == family
        else:
            name, value = line.rsplit(" ", 1)
            assert name.startswith(family)
            assert name not in found
            found[name] = float(value)
    return found


@pytest.mark.trio
async def test_metrics_count_and_sum_up(parts: Parts) -> None:
    revision = parts.registry.add().revision.id
    parts.pools.views = [fake_view(1, revision), fake_view(2, revision, InstanceState.FROZEN)]
    counters = parts.metrics.of("hello")
    for seconds in (0.0004, 0.0005, 0.003, 100.0):
        counters.observe(StartKind.WARM, OK, seconds)
    counters.observe(StartKind.COLD, FUNCTION_ERROR, 0.2)
    counters.reject("queue_full")
    response = await parts.call("GET", "/metrics")
    assert response.content_type.startswith(b"text/plain; version=0.0.4")
    assert not isinstance(response.body, bytes)
    found = _samples(await _text(response.body))
    assert found['poold_invocations_total{function="hello",start_kind="warm",outcome="ok"}'] == 4
    assert found['poold_invocations_total{function="hello",start_kind="cold",outcome="function_error"}'] == 1
    bucket = 'poold_invocation_duration_seconds_bucket{{function="hello",start_kind="warm",le="{}"}}'
    assert [found[bucket.format(le)] for le in ("0.0005", "0.001", "0.005", "60.0", "+Inf")] == [2, 2, 3, 3, 4]
    assert found['poold_invocation_duration_seconds_count{function="hello",start_kind="warm"}'] == 4
    total = found['poold_invocation_duration_seconds_sum{function="hello",start_kind="warm"}']
    assert total == pytest.approx(100.0039)
    assert found['poold_rejected_total{function="hello",reason="queue_full"}'] == 1
    assert found['poold_queue_length{function="hello"}'] == 3
    assert found['poold_instances{function="hello",state="frozen"}'] == 1
    assert found['poold_function_memory_bytes{function="hello"}'] == 512 * 1_048_576
    assert found["poold_memory_limit_bytes"] == 4096 * 1_048_576
    assert found["process_resident_memory_bytes"] > 1_000_000


@pytest.mark.trio
async def test_a_large_text_comes_in_pieces_that_let_others_run() -> None:
    metrics = Metrics()
    gauges = []
    for number in range(200):
        for kind in StartKind:
            metrics.of(f"f{number}").observe(kind, OK, 0.001)
        gauges.append(FunctionGauges(function=f"f{number}"))
    turns = 0
    done = False

    async def others() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        text = await _text(render(metrics, gauges, HostGauges(version="1", backend="b")))
        done = True
    lines = text.count("\n")
    assert lines > 200 * 4 * len(BUCKETS_S)
    assert turns >= lines // 64 // 2
    assert len(_samples(text)) > 0


@pytest.mark.trio
async def test_labels_are_escaped() -> None:
    metrics = Metrics()
    metrics.of("a").reject('quote " back \\ line \n end')
    text = await _text(render(metrics, [], HostGauges(version="1", backend="b")))
    assert 'reason="quote \\" back \\\\ line \\n end"' in text


def test_a_count_that_comes_after_its_function_went_does_not_stay():
    metrics = Metrics()
    for name in ("kept", "gone"):
        metrics.of(name).observe(StartKind.WARM, OK, 0.1)
    metrics.keep_only(["kept"])
    metrics.of("gone").observe(StartKind.WARM, OK, 0.1)  # it was running all the while
    metrics.keep_only(["kept", "new"])
    assert list(metrics.functions) == ["kept"]
