"""The simulated backend's own: latencies and faults by seed, answers on request, and what it holds against users."""

from __future__ import annotations

import random
from contextlib import aclosing
from typing import Any

import pytest
import trio
from backend_kinds import PORT, Printed, request
from trio.testing import MockClock

from pool.backends.base import BackendBack, BackendLost, InstanceExited
from pool.backends.simulated import SimulatedBackend
from pool.backends.simulated_counts import Faults
from pool.backends.simulated_running import SimulatedRunning
from pool.channel import Channel
from pool.errors import ArtifactError, BackendUnavailable, ChannelClosed, StartError
from pool.spec import Artifact, FunctionSpec, Revision, make_revision


def revision(**values: Any) -> Revision:
    return make_revision(FunctionSpec(name="f", image="echo:1", **values), Artifact(digest="sha256:1"))


async def start(backend: SimulatedBackend, instance_id: str = "i1", **values: Any) -> SimulatedRunning:
    running = await backend.start(request(revision(**values), instance_id))
    assert isinstance(running, SimulatedRunning)
    return running


async def send(channel: Channel, body: bytes = b"", **asks: object) -> None:
    headers = "".join(f"x-sim-{name.replace('_', '-')}: {value}\r\n" for name, value in asks.items())
    await channel.send_all(f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)


async def everything(channel: Channel) -> bytes:
    """All that comes until the stream ends or nothing more would ever come."""
    data = b""
    with trio.move_on_after(1000):
        while part := await channel.receive():
            data += part
    return data


@pytest.fixture
def backend() -> SimulatedBackend:
    return SimulatedBackend(7)


@pytest.mark.trio
async def test_an_answer_echoes_the_body_after_its_time(backend: SimulatedBackend, autojump_clock: MockClock) -> None:
    running = await start(backend)
    channel = await running.dial(PORT)
    began = trio.current_time()
    await send(channel, b"hello", delay_s=2)
    assert trio.current_time() == began
    answer = await channel.receive()
    assert trio.current_time() == pytest.approx(began + 2)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\nContent-Length: 5\r\n\r\nhello")
    assert running.serving == 0
    assert backend.counts.answers == 1


@pytest.mark.trio
async def test_a_request_may_ask_for_a_status_and_a_stream(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    channel = await (await start(backend)).dial(PORT)
    began = trio.current_time()
    await send(channel, b"abcdefgh", status=503, chunks=3, delay_s=1)
    assert (await channel.receive()).startswith(b"HTTP/1.1 503 ")
    parts = [await channel.receive() for _ in range(4)]
    assert parts == [b"3\r\nabc\r\n", b"3\r\ndef\r\n", b"2\r\ngh\r\n", b"0\r\n\r\n"]
    assert trio.current_time() == pytest.approx(began + 5)
    assert not channel.peer_gone()
    assert backend.counts.answers == 1


@pytest.mark.trio
async def test_two_requests_on_one_connection_are_answered_in_turn(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    channel = await (await start(backend, concurrency=2)).dial(PORT)
    await send(channel, b"one")
    await send(channel, b"two")
    assert (await channel.receive()).endswith(b"one")
    assert (await channel.receive()).endswith(b"two")
    assert backend.counts.violations == []


@pytest.mark.trio
async def test_an_answer_cut_off_in_the_middle(backend: SimulatedBackend, autojump_clock: MockClock) -> None:
    channel = await (await start(backend)).dial(PORT)
    await send(channel, b"hello", close=1)
    assert (await everything(channel)).endswith(b"\r\n\r\nhell")
    assert channel.peer_gone()
    with pytest.raises(ChannelClosed):
        await send(channel, b"more")
    assert backend.counts.answers == 0


@pytest.mark.trio
async def test_an_answer_that_is_no_http_and_one_that_never_comes(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    running = await start(backend, concurrency=2)
    garbled, silent = await running.dial(PORT), await running.dial(PORT)
    await send(garbled, garbage=1)
    assert not (await garbled.receive()).startswith(b"HTTP/")
    await send(silent, silent=1)
    assert await everything(silent) == b""
    assert running.serving == 2
    garbled.close()
    silent.close()
    assert running.serving == 0


@pytest.mark.trio
async def test_a_death_in_mid_request_is_told(backend: SimulatedBackend, autojump_clock: MockClock) -> None:
    running = await start(backend)
    channel = await running.dial(PORT)
    await send(channel, die=1)
    with pytest.raises(ChannelClosed, match="died"):
        await channel.receive()
    async with aclosing(backend.events()) as events:
        event = await anext(events)
    assert isinstance(event, InstanceExited)
    assert "signal 9" in event.detail
    assert (backend.counts.live, backend.counts.deaths) == (0, 1)
    await running.stop(0)
    assert backend.counts.live == 0


@pytest.mark.trio
async def test_what_a_frozen_instance_is_asked_waits_and_is_held_against_the_asker(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    running = await start(backend)
    channel = await running.dial(PORT)
    await running.freeze()
    await send(channel, b"too early", delay_s=1)
    assert [text.split(" ", 1)[1] for text in backend.counts.violations] == ["i1 was asked while frozen"]
    with trio.move_on_after(500) as limit:
        await channel.receive()
    assert limit.cancelled_caught
    await running.thaw()
    began = trio.current_time()
    assert (await channel.receive()).endswith(b"too early")
    assert trio.current_time() == pytest.approx(began + 1)


@pytest.mark.trio
async def test_freezing_stops_the_clock_of_what_is_under_way(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    backend.freeze_s = 0
    running = await start(backend)
    channel = await running.dial(PORT)
    await send(channel, b"x", delay_s=10)
    await trio.sleep(4)
    await running.freeze()
    assert "frozen while serving" in backend.counts.violations[0]
    await trio.sleep(100)
    await running.thaw()
    began = trio.current_time()
    await channel.receive()
    assert trio.current_time() == pytest.approx(began + 6)


@pytest.mark.trio
async def test_more_at_a_time_than_the_revision_allows_is_held_against_the_asker(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    running = await start(backend, concurrency=1)
    one, two = await running.dial(PORT), await running.dial(PORT)
    await send(one)
    assert backend.counts.violations == []
    await send(two)
    assert "i1 serves 2 at a time" in backend.counts.violations[0]
    assert backend.counts.max_serving == 2


@pytest.mark.trio
async def test_stopping_while_serving_is_counted(backend: SimulatedBackend, autojump_clock: MockClock) -> None:
    running = await start(backend)
    channel = await running.dial(PORT)
    await send(channel, silent=1)
    await running.stop(1)
    with pytest.raises(ChannelClosed):
        await channel.receive()
    channel.close()
    assert backend.counts.stopped_while_serving == 1
    assert backend.instances == {}


@pytest.mark.trio
async def test_it_listens_when_its_time_has_come(autojump_clock: MockClock) -> None:
    backend = SimulatedBackend(1, listen_s=5, dial_s=0)
    running = await start(backend)
    with pytest.raises(ChannelClosed, match="nothing listens"):
        await running.dial(PORT)
    await trio.sleep(6)
    (await running.dial(PORT)).close()


@pytest.mark.trio
async def test_a_lost_engine_answers_nothing_and_tells_what_died_when_it_is_back(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    running = await start(backend)
    backend.lose_engine("gone")
    for attempt in (start(backend, "i2"), backend.find(), running.stop(0)):
        with pytest.raises(BackendUnavailable, match="gone"):
            await attempt
    backend.restore_engine()
    async with aclosing(backend.events()) as events:
        told = [await anext(events) for _ in range(3)]
    assert told == [BackendLost("gone"), InstanceExited("i1", "ended with its engine"), BackendBack()]
    await running.stop(0)
    assert backend.counts.live == 0


@pytest.mark.trio
async def test_an_engine_lost_in_the_middle_of_a_start_fails_it(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    async def lose() -> None:
        await trio.sleep(0.05)
        backend.lose_engine()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose)
        with pytest.raises(BackendUnavailable):
            await start(backend)
    assert backend.counts.live == 0
    assert backend.counts.starting == 0


@pytest.mark.trio
async def test_every_image_exists_but_those_that_are_missing(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    lines: list[str] = []
    artifact = await backend.resolve(FunctionSpec(name="f", image="a:1"), None, lines.append)
    other = await backend.resolve(FunctionSpec(name="f", image="a:2"), None, lines.append)
    assert artifact.digest != other.digest
    assert lines
    with pytest.raises(ArtifactError, match="missing-it"):
        await backend.resolve(FunctionSpec(name="f", image="missing-it"), None, lines.append)


async def life(seed: int) -> list[str]:
    """A day with faults: what happened, as far as one can see from outside."""
    faults = Faults(start_fails=0.2, dies_idle=0.3, dies_in_request=0.1, garbage=0.1, silent=0.1, closes=0.1)
    backend = SimulatedBackend(seed, faults=faults)
    seen: list[str] = []
    for number in range(60):
        try:
            running = await start(backend, f"i{number}")
        except StartError as exc:
            seen.append(exc.message)
            continue
        await trio.sleep(1)
        try:
            channel = await running.dial(PORT)
            await send(channel, b"x")
            with trio.move_on_after(5):
                answer = await channel.receive()
                seen.append(f"{trio.current_time():.6f} {answer[:12]!r}")
            channel.close()
        except ChannelClosed as exc:
            seen.append(str(exc))
        await trio.sleep(20)
        seen.append(str(running.exited))
        await running.stop(1)
    counts = backend.counts
    assert counts.starts_failed > 0
    assert counts.deaths > 0
    assert counts.live == 0
    assert counts.violations == []
    return [*seen, str(counts)]


@pytest.mark.trio
async def test_the_same_seed_gives_the_same_life(autojump_clock: MockClock) -> None:
    lives = []
    for seed in (1, 1, 2):
        began = trio.current_time()
        random.seed(0)  # trio's own order of tasks is random
        offset = [text.replace(f"{began:.6f}", "") for text in await life(seed)]
        lives.append([text.split(" ", 1)[-1] for text in offset])
    assert lives[0] == lives[1]
    assert lives[0] != lives[2]


@pytest.mark.trio
async def test_what_an_instance_is_told_to_print(backend: SimulatedBackend, autojump_clock: MockClock) -> None:
    printed = Printed()
    running = await backend.start(request(revision(), "i1", printed))
    await send(await running.dial(PORT), print="hello")
    await printed.has(b"hello\n")


@pytest.mark.trio
async def test_a_cancelled_start_is_counted_and_leaves_nothing(
    backend: SimulatedBackend, autojump_clock: MockClock
) -> None:
    with trio.move_on_after(0.01):
        await start(backend)
    counts = backend.counts
    assert (counts.starts_cancelled, counts.starting, counts.live, counts.starts) == (1, 0, 0, 0)
    assert counts.max_starting == 1
