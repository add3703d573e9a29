"""One contract for every backend: what a Backend and a Running promise, asked of each of them for real."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from backend_kinds import (
    DockerKind,
    Kind,
    Printed,
    ProcessKind,
    SimulatedKind,
    answer,
    ask,
    connect,
    make,
    make_code,
    request,
)

from pool.backends.base import Backend, InstanceExited, Output, Running
from pool.errors import ArtifactError, BackendUnavailable, ChannelClosed, StartError
from pool.spec import FunctionSpec, MountSpec, SecuritySpec

REAL = ["process", "docker"]


@pytest.fixture
def kind(request: pytest.FixtureRequest, daemon_id: str, tmp_path: Path) -> Iterator[Kind]:
    """The backend a test is about, by indirect parameter; all of them where none is named."""
    if request.param == "simulated":
        yield SimulatedKind()
    elif request.param == "process":
        yield ProcessKind(daemon_id, tmp_path)
    else:
        docker_kind = DockerKind(daemon_id, tmp_path, request.getfixturevalue("docker_host"))
        yield docker_kind
        trio.run(docker_kind.clean)


everywhere = pytest.mark.parametrize("kind", ["simulated", *REAL], indirect=True)
where_code_runs = pytest.mark.parametrize("kind", REAL, indirect=True)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return make_code(tmp_path)


@asynccontextmanager
async def started(
    kind: Kind, code: Path, printed: Printed | None = None, spec: dict[str, object] | None = None, **env: str
) -> AsyncIterator[tuple[Backend, Running]]:
    """A backend with one instance, which is stopped at the end; then nothing may be left."""
    async with kind.open() as backend:
        revision = await make(backend, code, **(spec or {}))
        running = await backend.start(request(revision, "i1", printed, DAEMON=getattr(kind, "daemon_id", ""), **env))
        try:
            yield backend, running
        finally:
            with trio.CancelScope(shield=True):
                await running.stop(1.0)
        assert await trio.to_thread.run_sync(kind.leftovers) == []


async def exit_of(backend: Backend, instance_id: str) -> str:
    """What the backend's events say about the end of an instance."""
    with trio.fail_after(20):
        async with aclosing(backend.events()) as events:
            async for event in events:
                if isinstance(event, InstanceExited) and event.instance_id == instance_id:
                    return event.detail
    raise AssertionError("the events ended")


@everywhere
@pytest.mark.trio
async def test_an_instance_starts_answers_and_leaves_nothing(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (backend, running):
        assert backend.name == kind.name
        assert backend.isolation
        assert running.instance_id == "i1"
        assert running.exited is None
        channel = await connect(running)
        for body in (b"one", b"two", b"x" * 300_000):
            await ask(channel, body)
            assert await answer(channel) == body
        assert not channel.peer_gone()
        channel.close()
    assert running.exited is not None


@everywhere
@pytest.mark.trio
async def test_describing_itself(kind: Kind) -> None:
    async with kind.open() as backend:
        facts = await backend.describe()
    assert facts
    assert all(isinstance(value, str) and value for value in facts.values())


@everywhere
@pytest.mark.trio
async def test_nothing_listens_on_another_port(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (_, running):
        (await connect(running)).close()
        with pytest.raises(ChannelClosed):
            await running.dial(8081)


@everywhere
@pytest.mark.trio
async def test_frozen_means_no_answer_until_thawed(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (_, running):
        assert running.can_freeze
        channel = await connect(running)
        await ask(channel, b"warm")
        assert await answer(channel) == b"warm"
        for _ in range(3):
            await running.freeze()
            await ask(channel, b"wake up")
            with trio.move_on_after(0.05) as limit:
                await channel.receive()
            assert limit.cancelled_caught
            await running.thaw()
            assert await answer(channel) == b"wake up"
        channel.close()


@everywhere
@pytest.mark.trio
async def test_a_frozen_instance_can_be_stopped(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (_, running):
        (await connect(running)).close()
        await running.freeze()
        with trio.fail_after(20):
            await running.stop(5.0)


@everywhere
@pytest.mark.trio
async def test_stopping_twice_and_at_once_is_harmless(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (_, running):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.stop, 0.5)
            nursery.start_soon(running.stop, 0.0)
        await running.stop(1.0)


@everywhere
@pytest.mark.trio
async def test_a_crash_in_mid_request_is_told_at_once(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (backend, running):
        channel = await connect(running)
        await ask(channel, b"", "x-sim-die: 1")
        with trio.fail_after(20):
            with suppress(ChannelClosed):
                assert await channel.receive() == b""
        assert "killed by signal 9" in await exit_of(backend, "i1")
        assert "killed by signal 9" in (running.exited or "")
        with pytest.raises((ChannelClosed, BackendUnavailable)):
            await running.dial(8080)
        channel.close()


@where_code_runs
@pytest.mark.trio
async def test_code_that_exits_at_once(kind: Kind, code: Path) -> None:
    printed = Printed()
    async with started(kind, code, printed, MODE="exits") as (backend, running):
        assert await exit_of(backend, "i1") == "exit code 3"
        assert running.exited == "exit code 3"
        await running.stop(1.0)
        await printed.has(b"started\n")
        await printed.has(b"giving up\n", Output.STDERR)


@everywhere
@pytest.mark.trio
async def test_what_it_prints_is_handed_on(kind: Kind, code: Path) -> None:
    printed = Printed()
    async with started(kind, code, printed) as (_, running):
        channel = await connect(running)
        await ask(channel, b"", "x-sim-print: hello there")
        await answer(channel)
        await printed.has(b"hello there\n")
        channel.close()


@where_code_runs
@pytest.mark.trio
async def test_stopping_asks_first_and_keeps_the_last_words(kind: Kind, code: Path) -> None:
    printed = Printed()
    async with started(kind, code, printed, MODE="polite") as (_, running):
        (await connect(running)).close()
        await running.stop(20.0)
        assert printed.text[Output.STDOUT].endswith(b"bye\n")
        assert running.exited == "exit code 0"


@where_code_runs
@pytest.mark.trio
async def test_what_does_not_end_when_asked_is_killed(kind: Kind, code: Path) -> None:
    async with started(kind, code, MODE="stubborn") as (_, running):
        (await connect(running)).close()
        with trio.fail_after(20):
            await running.stop(0.05)
        assert "killed by signal 9" in (running.exited or "")


@where_code_runs
@pytest.mark.trio
async def test_processes_that_the_code_leaves_behind_end_with_it(kind: Kind, code: Path) -> None:
    async with started(kind, code, MODE="leaves children") as (_, running):
        (await connect(running)).close()


@where_code_runs
@pytest.mark.trio
async def test_code_that_asks_finds_the_daemon_listening_inside(kind: Kind, code: Path) -> None:
    printed = Printed()
    async with started(kind, code, printed, MODE="asks") as (_, running), await running.listen(9001) as listener:
        with trio.fail_after(20):
            stream = await listener.accept()
        assert await stream.receive_some(100) == b"what next?"
        await stream.send_all(b"serve")
        await printed.has(b"told: serve\n")
        await stream.aclose()
        with pytest.raises(OSError, match="in use"):
            await running.listen(9001)


@pytest.mark.parametrize("kind", ["simulated"], indirect=True)
@pytest.mark.trio
async def test_where_listening_is_not_possible_it_says_so(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (_, running):
        with pytest.raises(BackendUnavailable, match="cannot listen"):
            await running.listen(9001)


@everywhere
@pytest.mark.trio
async def test_use_is_measured(kind: Kind, code: Path) -> None:
    async with started(kind, code) as (_, running):
        channel = await connect(running)
        await ask(channel, b"x")
        await answer(channel)
        usage = await running.sample()
        assert 0 < usage.memory_mb <= 64
        assert usage.cpu_s > 0
        channel.close()


@everywhere
@pytest.mark.trio
async def test_instances_at_a_time_with_the_same_port_are_apart(kind: Kind, code: Path) -> None:
    async with kind.open() as backend:
        revision = await make(backend, code, network="none")
        found: dict[str, Running] = {}

        async def start(instance_id: str) -> None:
            found[instance_id] = await backend.start(request(revision, instance_id))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(start, f"i{number}")
        channels = {name: await connect(running) for name, running in found.items()}
        await ask(channels["i0"], b"", "x-sim-die: 1")
        assert await exit_of(backend, "i0")
        for name in ("i1", "i2"):
            await ask(channels[name], name.encode())
            assert await answer(channels[name]) == name.encode()
        for name, channel in channels.items():
            channel.close()
            await found[name].stop(0.0)
        assert await trio.to_thread.run_sync(kind.leftovers) == []


@everywhere
@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.02, 0.1])
@pytest.mark.trio
async def test_a_cancelled_start_leaves_nothing(kind: Kind, code: Path, after_s: float) -> None:
    async with kind.open() as backend:
        revision = await make(backend, code)
        running = None
        with trio.move_on_after(after_s):
            running = await backend.start(request(revision, DAEMON=getattr(kind, "daemon_id", "")))
        if running is not None:  # it was quicker
            await running.stop(0.0)
        assert await trio.to_thread.run_sync(kind.leftovers) == []


@where_code_runs
@pytest.mark.trio
async def test_an_interpreter_that_does_not_exist(kind: Kind, tmp_path: Path) -> None:
    code = make_code(tmp_path, "#!/usr/bin/no-such-language\n")
    async with kind.open() as backend:
        revision = await make(backend, code)
        if kind.name == "process":
            with pytest.raises(StartError, match="cannot be executed") as caught:
                await backend.start(request(revision))
            assert caught.value.permanent
            assert not caught.value.backend_fault
        else:  # the engine starts an init of its own, which then finds nothing to run
            running = await backend.start(request(revision))
            assert "exit code 127" in await exit_of(backend, "i1")
            await running.stop(0.0)
        assert await trio.to_thread.run_sync(kind.leftovers) == []


@where_code_runs
@pytest.mark.parametrize(("mode", "message"), [(0o644, "0644"), (None, "bootstrap")])
@pytest.mark.trio
async def test_a_bootstrap_that_cannot_run_is_refused(kind: Kind, code: Path, mode: int | None, message: str) -> None:
    if mode is None:
        (code / "bootstrap").unlink()
    else:
        (code / "bootstrap").chmod(mode)
    async with kind.open() as backend:
        with pytest.raises(ArtifactError, match=message) as caught:
            await make(backend, code)
        assert caught.value.hint


@everywhere
@pytest.mark.trio
async def test_an_image_that_cannot_be_used_is_refused(kind: Kind) -> None:
    spec = FunctionSpec(name="f", image="missing/nowhere:1")
    async with kind.open() as backend:
        with pytest.raises(ArtifactError, match="missing/nowhere") as caught:
            await backend.resolve(spec, None, lambda line: None)
        assert caught.value.hint


@where_code_runs
@pytest.mark.trio
async def test_instances_are_hardened(kind: Kind, code: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    spec: dict[str, object] = {
        "network": "none",
        "workdir": "/tmp",
        "security": SecuritySpec(tmpfs_mb=8),
        "mounts": (MountSpec(source=str(shared), target="/shared/deep"),),
    }
    async with started(kind, code, None, spec, GREETING="hi\nthere") as (_, running):
        channel = await connect(running)
        await ask(channel, path="/facts")
        facts = json.loads(await answer(channel))
        channel.close()
    assert facts["user"] == 65534
    assert int(facts["capabilities"], 16) == 0
    assert facts["no_new_privileges"] == "1"
    assert facts["writable"] == ["/tmp/here"]
    assert facts["directory"] == "/tmp"
    assert facts["processes"] <= 3
    assert facts["interfaces"] == ["lo"]
    assert facts["env"]["GREETING"] == "hi\nthere"
    assert facts["env"]["PATH"]


@pytest.mark.parametrize("kind", ["simulated", "docker"], indirect=True)
@pytest.mark.trio
async def test_a_new_daemon_takes_over_what_runs(kind: Kind, code: Path) -> None:
    async with kind.open() as backend:
        revision = await make(backend, code)
        first = await backend.start(request(revision))
        (await connect(first)).close()
        await first.freeze()
        assert await backend.find() == []
    async with kind.open() as backend:
        (found,) = await backend.find()
        assert (found.instance_id, found.revision_id) == ("i1", revision.id)
        assert found.running
        assert found.frozen
        printed = Printed()
        running = await backend.adopt(found, revision, printed)
        channel = await connect(running)
        await ask(channel, b"still there", "x-sim-print: adopted")
        assert await answer(channel) == b"still there"
        await printed.has(b"adopted\n")
        channel.close()
        await running.stop(1.0)
        assert await trio.to_thread.run_sync(kind.leftovers) == []


@pytest.mark.parametrize("kind", ["simulated", "docker"], indirect=True)
@pytest.mark.trio
async def test_what_a_new_daemon_does_not_want_it_removes(kind: Kind, code: Path) -> None:
    async with kind.open() as backend:
        await backend.start(request(await make(backend, code)))
    async with kind.open() as backend:
        for found in await backend.find():
            await backend.remove(found)
        assert await backend.find() == []
    assert await trio.to_thread.run_sync(kind.leftovers) == []
