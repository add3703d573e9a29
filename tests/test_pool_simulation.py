"""Whole lives of a pool, drawn by seed: load, faults, redeploys, an engine that comes and goes.

Hypothesis seeds Python's random module, which trio's own scheduling order comes from too, so a failure replays.
"""

from __future__ import annotations

import random

import trio
import trio.testing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pool.backends.simulated import SimulatedBackend
from pool.backends.simulated_counts import Faults
from pool.contracts.base import Call
from pool.contracts.registry import CONTRACTS
from pool.dispatcher import Dispatcher
from pool.errors import ExchangeError, Rejected, StartError
from pool.spec import FunctionSpec, PoolSpec, QueueSpec, Revision, make_revision
from scheduler.model import HostLimits

MEMORY_MB = 1024
LENGTH_S = 60.0


class Life:
    """One simulated life: what is deployed now, and what became of every invocation."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        faults = Faults(
            start_fails=self.draw.choice((0, 0.1, 0.5)),
            dies_idle=self.draw.choice((0, 0.2)),
            dies_in_request=self.draw.choice((0, 0.05)),
            garbage=self.draw.choice((0, 0.02)),
            closes=self.draw.choice((0, 0.02)),
        )
        self.backend = SimulatedBackend(
            seed, start_s=0.5, listen_s=0.2, answer_s=0.2, freeze_s=0.01, thaw_s=0.01, faults=faults
        )
        self.deployed: dict[str, Revision] = {}
        self.begun = self.answered = self.failed = self.refused = self.gave_up = 0

    def spec(self, name: str) -> FunctionSpec:
        draw = self.draw
        floor = draw.randint(0, 2)
        return FunctionSpec(
            name=name,
            image="sim",
            env={"N": str(draw.random())},
            concurrency=draw.choice((1, 1, 3)),
            memory_mb=draw.choice((64, 128)),
            queue=QueueSpec(max=draw.choice((0, 5, 50)), timeout_s=10),
            pool=PoolSpec(
                min=floor,
                max=max(1, floor + draw.randint(0, 4)),
                freeze_after_s=draw.choice((None, 0, 1)),
                keepalive_s=draw.choice((1, 20)),
                keepalive=draw.choice(("ttl", "lru")),
                max_uses=draw.choice((None, 5)),
                max_age_s=draw.choice((None, 15)),
            ),
        )

    async def deploy(self, dispatcher: Dispatcher, name: str) -> None:
        spec = self.spec(name)
        revision = make_revision(
            spec, await SimulatedBackend(0).resolve(spec, None, lambda line: None)
        )  # resolved elsewhere: the engine may be gone
        old = self.deployed.get(name)
        dispatcher.deploy(revision)
        self.deployed[name] = revision
        if old is not None:
            dispatcher.remove(old.id, replaced_by=revision.id)

    async def client(self, dispatcher: Dispatcher, name: str) -> None:
        draw = self.draw
        end_s = trio.current_time() + LENGTH_S
        while trio.current_time() < end_s:
            await trio.sleep(draw.expovariate(2))
            revision = self.deployed[name]
            self.begun += 1
            patience_s = draw.choice((0.1, 1, 60))
            with trio.move_on_after(patience_s) as patience:
                await self.invoke(dispatcher, revision)
            if patience.cancelled_caught:
                self.gave_up += 1

    async def invoke(self, dispatcher: Dispatcher, revision: Revision) -> None:
        body = revision.id.encode()
        try:
            async with dispatcher.lease(revision.id, 10) as lease:
                reply = await lease.exchange(Call("id", b"POST", b"/", [], body))
                assert (reply.status, reply.body) == (200, body), "another's answer"
        except (Rejected, StartError):
            self.refused += 1
        except ExchangeError:
            self.failed += 1
        else:
            self.answered += 1

    async def trouble(self, dispatcher: Dispatcher) -> None:
        while True:
            await trio.sleep(self.draw.uniform(5, 20))
            what = self.draw.choice(("redeploy", "scale", "recycle", "engine", "reset"))
            name = self.draw.choice(list(self.deployed))
            if what == "redeploy":
                await self.deploy(dispatcher, name)
            elif what == "scale":
                floor = self.draw.randint(0, 3)
                dispatcher.scale(self.deployed[name].id, floor, floor + self.draw.randint(1, 3))
            elif what == "recycle":
                dispatcher.recycle(self.deployed[name].id)
            elif what == "reset":
                dispatcher.reset_breaker(self.deployed[name].id)
            else:
                self.backend.lose_engine(kill=self.draw.random() < 0.5)
                try:
                    await trio.sleep(self.draw.uniform(0.1, 5))
                finally:
                    self.backend.restore_engine()

    async def watch_memory(self, dispatcher: Dispatcher) -> None:
        while True:
            host = dispatcher.host_stats()
            assert host.memory_charged_mb <= MEMORY_MB
            assert host.starts_in_flight <= 3
            await trio.sleep(0.1)

    async def live(self) -> None:
        limits = HostLimits(memory_mb=MEMORY_MB, max_concurrency=8, tenant_concurrency=7, max_starts=3)
        async with self.backend:
            dispatcher = Dispatcher(self.backend, CONTRACTS, limits, epoch="1", seed=1)
            async with trio.open_nursery() as nursery:
                await nursery.start(dispatcher.run)
                for name in "abc":
                    await self.deploy(dispatcher, name)
                async with trio.open_nursery() as around:
                    around.start_soon(self.trouble, dispatcher)
                    around.start_soon(self.watch_memory, dispatcher)
                    async with trio.open_nursery() as clients:
                        for name in "aaabbbccc":
                            clients.start_soon(self.client, dispatcher, name)
                    around.cancel_scope.cancel()
                await self.settle(dispatcher)
                await dispatcher.drain(60)
                nursery.cancel_scope.cancel()

    async def settle(self, dispatcher: Dispatcher) -> None:
        """When the faults stop, every function serves again: nothing has been lost on the way."""
        self.backend.faults = Faults()
        for revision in self.deployed.values():
            dispatcher.reset_breaker(revision.id)
            await trio.sleep(1)
            before = self.answered
            with trio.fail_after(60):
                while self.answered == before:
                    await self.invoke(dispatcher, revision)
                    await trio.sleep(0.5)
        host = dispatcher.host_stats()
        assert (host.running, host.queued) == (0, 0)


@given(st.random_module(), st.integers(min_value=0, max_value=2**32))
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a seed cannot be shrunk to anything simpler
)
def test_nothing_is_lost_and_nothing_is_left(random_module: object, seed: int) -> None:
    life = Life(seed)
    trio.run(life.live, clock=trio.testing.MockClock(autojump_threshold=0))
    counts = life.backend.counts
    assert counts.violations == []
    assert (counts.live, counts.starting) == (0, 0)
    assert life.begun <= life.answered + life.failed + life.refused + life.gave_up
    assert life.answered > 0
