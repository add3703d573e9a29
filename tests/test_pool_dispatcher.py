"""The real dispatcher and core on the simulated backend, under a clock that jumps: no waiting, no chance."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from pool.backends.simulated import SimulatedBackend
from pool.backends.simulated_counts import Faults
from pool.backends.simulated_running import SimulatedRunning
from pool.contracts.base import Call, Reply
from pool.contracts.push import PushSession
from pool.contracts.registry import CONTRACTS
from pool.dispatcher import Dispatcher
from pool.errors import BackendUnavailable, BadAnswer, ExchangeError, Rejected, StartError
from pool.recovery import recover
from pool.spec import FunctionSpec, PoolSpec, Revision, make_revision
from scheduler.errors import ConfigurationError, InvariantError
from scheduler.model import HostLimits, InstanceState, RejectReason, StartKind


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


def spec_of(name: str = "f", **changes: object) -> FunctionSpec:
    pool = changes.pop("pool", PoolSpec(min=1, freeze_after_s=None))
    return FunctionSpec(name=name, image="sim", pool=pool, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(
    backend: SimulatedBackend, limits: HostLimits | None = None, epoch: str = "1"
) -> AsyncIterator[Dispatcher]:
    async with backend:
        dispatcher = Dispatcher(backend, CONTRACTS, limits or HostLimits(), epoch=epoch, seed=1)
        async with trio.open_nursery() as nursery:
            await nursery.start(dispatcher.run)
            yield dispatcher
            nursery.cancel_scope.cancel()


async def deploy(dispatcher: Dispatcher, spec: FunctionSpec, count: int = 1) -> Revision:
    artifact = await dispatcher.backend.resolve(spec, None, lambda line: None)
    revision = make_revision(spec, artifact)
    dispatcher.deploy(revision)
    if count:
        await dispatcher.wait_ready(revision.id, count)
    return revision


async def invoke(
    dispatcher: Dispatcher, revision: Revision, body: bytes = b"x", *, wait_s: float = 30, headers: tuple = ()
) -> tuple[StartKind, Reply]:
    call = Call("id", b"POST", b"/", [(b"host", b"f"), *headers], body)
    async with dispatcher.lease(revision.id, wait_s) as lease:
        reply = await lease.exchange(call)
    return lease.start_kind, reply


async def until(condition: Callable[[], object]) -> None:
    """Let virtual time pass until the condition holds."""
    with trio.fail_after(100):
        while not condition():
            await trio.sleep(0.01)


@pytest.mark.trio
async def test_the_first_use_of_a_floor_instance_is_prewarmed_and_the_next_warm(autojump_clock):
    async with running(SimulatedBackend(1)) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        kind, reply = await invoke(dispatcher, revision, b"hello")
        assert (kind, reply.status, reply.body) == (StartKind.PREWARMED, 200, b"hello")
        assert (await invoke(dispatcher, revision))[0] is StartKind.WARM


@pytest.mark.trio
async def test_without_a_floor_the_first_is_cold_and_waits_for_the_start(autojump_clock):
    async with running(SimulatedBackend(1, start_s=2)) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=0, freeze_after_s=None)), count=0)
        asked_s = trio.current_time()
        async with dispatcher.lease(revision.id, 30) as lease:
            reply = await lease.exchange(Call("id", b"GET", b"/", []))
        assert (lease.start_kind, reply.status) == (StartKind.COLD, 200)
        stages = dict(lease.stages())
        assert set(stages) == {"queue", "start", "connect", "init"}
        assert stages["start"] > 1
        assert sum(stages.values()) == pytest.approx(lease.granted_s - asked_s)


@pytest.mark.trio
async def test_a_frozen_instance_is_thawed_by_its_lease(autojump_clock):
    backend = SimulatedBackend(1, thaw_s=0.1)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=1, freeze_after_s=5)))
        await until(lambda: backend.counts.freezes == 1)
        async with dispatcher.lease(revision.id, math.inf) as lease:
            await lease.exchange(Call("id", b"GET", b"/", []))
        assert lease.start_kind is StartKind.PREWARMED
        assert lease.thaw_s > 0.05
        assert dict(lease.stages())["thaw"] == lease.thaw_s
        await until(lambda: backend.counts.freezes == 2)
        assert (await invoke(dispatcher, revision))[0] is StartKind.THAWED
    assert backend.counts.violations == []


@pytest.mark.trio
async def test_an_invocation_overtakes_a_freeze_under_way(autojump_clock):
    backend = SimulatedBackend(1, freeze_s=3)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=1, freeze_after_s=0)))
        await trio.sleep(0.5)  # in the middle of the freeze
        _, reply = await invoke(dispatcher, revision)
        assert reply.status == 200
    assert backend.counts.violations == []


@pytest.mark.trio
async def test_more_at_a_time_than_slots_wait_and_the_one_cancelled_gives_up_its_place(autojump_clock):
    backend = SimulatedBackend(1, answer_s=1)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=1, max=1, freeze_after_s=None)))
        done: list[str] = []

        async def one(name: str) -> None:
            await invoke(dispatcher, revision)
            done.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "first")
            await trio.testing.wait_all_tasks_blocked(0.001)
            given_up = trio.CancelScope()

            async def impatient() -> None:
                with given_up:
                    await one("impatient")

            nursery.start_soon(impatient)
            await trio.testing.wait_all_tasks_blocked(0.001)
            nursery.start_soon(one, "third")
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert dispatcher.stats(revision.id).queued == 2
            given_up.cancel()
        assert done == ["first", "third"]
        assert backend.counts.max_serving == 1


@pytest.mark.trio
async def test_an_invocation_cut_in_the_middle_costs_the_instance(autojump_clock):
    backend = SimulatedBackend(1, answer_s=10)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        before = {view.id for view in dispatcher.instances()}
        with trio.move_on_after(1):
            await invoke(dispatcher, revision)
        await until(lambda: dispatcher.stats(revision.id).instances[InstanceState.IDLE] == 1)
        assert before.isdisjoint({view.id for view in dispatcher.instances()})
        assert backend.counts.live == 1


@pytest.mark.trio
@pytest.mark.parametrize(
    ("ask", "error"), [(b"garbage", BadAnswer), (b"die", ExchangeError), (b"close", ExchangeError)]
)
async def test_an_instance_that_fails_an_invocation_is_replaced(autojump_clock, ask, error):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        with pytest.raises(error) as caught:
            await invoke(dispatcher, revision, headers=((b"x-sim-" + ask, b"1"),))
        assert caught.value.sent
        await until(lambda: dispatcher.stats(revision.id).instances[InstanceState.IDLE] == 1)
        assert (await invoke(dispatcher, revision))[1].status == 200
        assert backend.counts.starts == 2


@pytest.mark.trio
async def test_an_instance_that_dies_idle_is_replaced(autojump_clock):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        (only,) = backend.instances.values()
        await invoke(dispatcher, revision)
        only.die("exit code 3")
        await until(lambda: backend.counts.starts == 2 and backend.counts.live == 1)
        assert (await invoke(dispatcher, revision))[0] is StartKind.PREWARMED


@pytest.mark.trio
async def test_a_start_that_fails_says_why_to_those_who_wait_for_it(autojump_clock):
    backend = SimulatedBackend(1, faults=Faults(start_fails=1))
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=0)), count=0)
        with pytest.raises(StartError, match="a simulated fault"):
            await invoke(dispatcher, revision)
        floor = await deploy(dispatcher, spec_of("g"), count=0)
        with pytest.raises(StartError, match="a simulated fault"):
            await dispatcher.wait_ready(floor.id)


@pytest.mark.trio
async def test_code_that_never_listens_is_a_start_error_after_its_time(autojump_clock):
    backend = SimulatedBackend(1, listen_s=1_000)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(start_timeout_s=5, pool=PoolSpec(min=0)), count=0)
        began_s = trio.current_time()
        with pytest.raises(StartError, match="within 5 s") as caught:
            await invoke(dispatcher, revision)
        assert "PORT" in caught.value.hint
        assert "simulated" in caught.value.log_tail
        assert trio.current_time() - began_s < 6
        assert backend.counts.live == 0


@pytest.mark.trio
async def test_while_the_engine_is_gone_nothing_starts_and_then_the_floor_returns(autojump_clock):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        backend.lose_engine("gone for a test")
        await until(lambda: not dispatcher.live_instances(revision.id))
        with pytest.raises(Rejected) as caught:
            await invoke(dispatcher, revision)
        assert caught.value.reason is RejectReason.BACKEND_DOWN
        assert "gone for a test" in caught.value.message
        backend.restore_engine()
        await until(lambda: dispatcher.stats(revision.id).instances[InstanceState.IDLE] == 1)
        assert (await invoke(dispatcher, revision))[1].status == 200


@pytest.mark.trio
async def test_a_redeployed_function_moves_its_queue_and_forgets_the_old_revision(autojump_clock):
    backend = SimulatedBackend(1, answer_s=5)
    async with running(backend) as dispatcher:
        old = await deploy(dispatcher, spec_of(pool=PoolSpec(min=1, max=1, freeze_after_s=None)))
        new = await deploy(dispatcher, spec_of(env={"A": "1"}))
        answers: list[int] = []

        async def one() -> None:
            answers.append((await invoke(dispatcher, old))[1].status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked(0.001)
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked(0.001)
            dispatcher.remove(old.id, replaced_by=new.id)
        assert answers == [200, 200]
        await until(lambda: dispatcher.deployment(old.id) is None)
        assert backend.counts.live == 1


@pytest.mark.trio
async def test_drain_lets_what_runs_end_and_leaves_nothing(autojump_clock):
    backend = SimulatedBackend(1, answer_s=5)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=3, freeze_after_s=None)), count=3)
        statuses: list[int] = []

        async def one() -> None:
            statuses.append((await invoke(dispatcher, revision))[1].status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert await dispatcher.drain(60)
        assert statuses == [200]
        assert backend.counts.live == 0
        with pytest.raises(Rejected) as caught:
            await invoke(dispatcher, revision)
        assert caught.value.reason is RejectReason.DRAINING


@pytest.mark.trio
async def test_drain_cuts_what_takes_too_long(autojump_clock):
    backend = SimulatedBackend(1, answer_s=1_000)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        async with trio.open_nursery() as nursery:

            async def one() -> None:
                with pytest.raises(ExchangeError):
                    await invoke(dispatcher, revision)

            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked(0.001)
            began_s = trio.current_time()
            assert not await dispatcher.drain(3)
            assert trio.current_time() - began_s < 20
        assert backend.counts.live == 0


@pytest.mark.trio
async def test_the_next_daemon_adopts_what_is_of_a_live_revision_and_removes_the_rest(autojump_clock):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        kept = await deploy(dispatcher, spec_of("kept", pool=PoolSpec(min=2, freeze_after_s=1)), count=2)
        await deploy(dispatcher, spec_of("gone"))
        await until(lambda: backend.counts.freezes == 2)
    assert backend.counts.live == 3
    async with running(backend, epoch="2") as dispatcher:
        dispatcher.hold_starts("starting")
        dispatcher.deploy(kept)
        result = await recover(dispatcher)
        dispatcher.release_starts()
        assert (result.adopted, result.removed) == (2, 1)
        assert backend.counts.live == 2
        assert (await invoke(dispatcher, kept))[0] in (StartKind.WARM, StartKind.THAWED)
        await trio.sleep(5)
        assert backend.counts.starts == 3  # the floor was met by the adopted


@pytest.mark.trio
async def test_what_an_instance_prints_is_in_the_book_of_its_function(autojump_clock):
    async with running(SimulatedBackend(1)) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        lines = [line.text for line in dispatcher.logs.tail("f", 10)]
        assert lines == [f"simulated {revision.id}"]


async def _odd(*_: object, **__: object) -> None:
    await trio.lowlevel.checkpoint()
    raise ValueError("nobody expected this")


@pytest.mark.trio
@pytest.mark.parametrize("step", ["start", "dial", "stop", "freeze", "sample"])
async def test_an_unexpected_fault_in_one_function_ends_neither_the_dispatcher_nor_leaves_an_instance(
    autojump_clock, monkeypatch, step
):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        good = await deploy(dispatcher, spec_of("good"))
        bad = await deploy(dispatcher, spec_of("bad", pool=PoolSpec(min=1, freeze_after_s=3)))
        owner = backend if step == "start" else SimulatedRunning
        monkeypatch.setattr(owner, step, _odd)
        dispatcher.recycle(bad.id)
        await dispatcher.sample()
        await trio.sleep(7)
        monkeypatch.undo()
        assert (await invoke(dispatcher, good))[1].status == 200
        dispatcher.reset_breaker(bad.id)
        assert (await invoke(dispatcher, bad))[1].status == 200
        dispatcher.remove(bad.id)
        await until(lambda: dispatcher.deployment(bad.id) is None)
        await until(lambda: backend.counts.live == 1)


@pytest.mark.trio
async def test_a_start_that_fails_unexpectedly_is_told_to_those_who_wait_and_cleans_up_later(
    autojump_clock, monkeypatch
):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=0)), count=0)
        monkeypatch.setattr(SimulatedRunning, "dial", _odd)
        monkeypatch.setattr(SimulatedRunning, "stop", _odd)
        with pytest.raises(StartError, match="inside poold: nobody expected this"):
            await invoke(dispatcher, revision)
        assert backend.counts.live == 1
        monkeypatch.undo()
        await until(lambda: backend.counts.live == 0)


@pytest.mark.trio
async def test_a_drain_that_cannot_stop_one_instance_stops_the_others(autojump_clock, monkeypatch):
    backend = SimulatedBackend(1, answer_s=1_000)
    async with running(backend) as dispatcher:
        stubborn = await deploy(dispatcher, spec_of("stubborn"))
        await deploy(dispatcher, spec_of("other"))
        (name,) = (view.id for view in dispatcher.instances(stubborn.id))
        monkeypatch.setattr(dispatcher.instance(name).running, "stop", _odd, raising=True)
        assert not await dispatcher.drain(3)
        assert list(backend.instances) == [name]


@pytest.mark.trio
async def test_an_instance_that_dies_as_its_start_ends_is_replaced(autojump_clock, monkeypatch):
    backend = SimulatedBackend(1)
    real = PushSession.prepare

    async def die_at_the_end(session: PushSession) -> None:
        await real(session)
        if backend.counts.starts == 1:
            (only,) = backend.instances.values()
            only.die("exit code 3")
            await trio.testing.wait_all_tasks_blocked()  # the exit is told before the instance is known

    monkeypatch.setattr(PushSession, "prepare", die_at_the_end)
    async with running(backend) as dispatcher:
        with trio.fail_after(100):
            revision = await deploy(dispatcher, spec_of(), count=2)
        assert backend.counts.live == 1
        assert (await invoke(dispatcher, revision))[1].status == 200


@pytest.mark.trio
async def test_what_cannot_be_removed_keeps_the_next_daemon_from_nothing(autojump_clock, monkeypatch):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        kept = await deploy(dispatcher, spec_of("kept"))
        await deploy(dispatcher, spec_of("gone"))

    async def refuse(found: object) -> None:
        await trio.lowlevel.checkpoint()
        raise BackendUnavailable("device or resource busy")

    monkeypatch.setattr(backend, "remove", refuse)
    async with running(backend, epoch="2") as dispatcher:
        dispatcher.hold_starts("starting")
        dispatcher.deploy(kept)
        result = await recover(dispatcher)
        dispatcher.release_starts()
        assert (result.adopted, result.removed) == (1, 0)
        assert (await invoke(dispatcher, kept))[0] is StartKind.WARM


@pytest.mark.trio
async def test_starts_that_recovery_held_stay_held_while_the_engine_is_gone(autojump_clock):
    backend = SimulatedBackend(1)
    async with running(backend) as dispatcher:
        dispatcher.hold_starts("starting")
        revision = await deploy(dispatcher, spec_of(), count=0)
        backend.lose_engine("gone for a test")
        await until(lambda: dispatcher.backend_problem)
        dispatcher.release_starts()
        assert not dispatcher.live_instances(revision.id)
        backend.restore_engine()
        await until(lambda: dispatcher.stats(revision.id).instances[InstanceState.IDLE] == 1)


@pytest.mark.trio
async def test_a_freeze_that_fails_half_way_is_undone(autojump_clock, monkeypatch):
    backend = SimulatedBackend(1)
    real = SimulatedRunning.freeze

    async def lose_the_answer(instance: SimulatedRunning) -> None:
        await real(instance)
        raise BackendUnavailable("it did not answer in time")

    monkeypatch.setattr(SimulatedRunning, "freeze", lose_the_answer)
    async with running(backend) as dispatcher:
        revision = await deploy(dispatcher, spec_of(pool=PoolSpec(min=1, freeze_after_s=1)))
        await until(lambda: backend.counts.freezes == 1)
        with trio.fail_after(5):
            assert (await invoke(dispatcher, revision))[1].status == 200
    assert backend.counts.violations == []


@pytest.mark.trio
async def test_a_deployment_that_the_core_refuses_changes_nothing(autojump_clock):
    async with running(SimulatedBackend(1)) as dispatcher:
        revision = await deploy(dispatcher, spec_of())
        before = dispatcher.deployment(revision.id)
        with pytest.raises(InvariantError):
            dispatcher.deploy(revision)
        assert dispatcher.deployment(revision.id) is before
        strange = await dispatcher.backend.resolve(spec_of("g"), None, lambda line: None)
        refused = make_revision(spec_of("g", pool=PoolSpec(keepalive="unheard-of")), strange)
        with pytest.raises(ConfigurationError):
            dispatcher.deploy(refused)
        assert dispatcher.deployment(refused.id) is None
