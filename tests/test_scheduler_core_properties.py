"""The core under random events and faults: its books stay right, and when the faults stop everything drains."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_world import World

from scheduler.errors import ConfigurationError, InvariantError
from scheduler.journal import Replay, dump
from scheduler.messages import (
    Abandoned,
    Adopted,
    BackendDown,
    BackendUp,
    BreakerReset,
    Deployed,
    Drained,
    Event,
    FreezeFailed,
    Frozen,
    Recycled,
    Released,
    Removed,
    Sampled,
    Scaled,
    Started,
    StartFailed,
    Stopped,
    Thawed,
    Ticked,
)
from scheduler.model import RevisionSpec
from scheduler.snapshot import capture

SPECS = st.fixed_dictionaries(
    {
        "function": st.sampled_from(["f", "g", "h"]),
        "tenant": st.sampled_from(["t", "u"]),
        "slots": st.sampled_from([1, 1, 2, 3]),
        "min_instances": st.integers(0, 2),
        "max_instances": st.integers(2, 4),
        "memory_mb": st.sampled_from([100, 200, 350]),
        "reserved": st.sampled_from([0, 0, 0, 1, 2]),
        "queue_max": st.sampled_from([0, 1, 3, 10]),
        "keepalive": st.sampled_from(["ttl", "lru"]),
        "keepalive_s": st.sampled_from([0.0, 2.0, 30.0]),
        "freeze_after_s": st.sampled_from([0.0, 0.5, 1.0, None]),
        "max_age_s": st.sampled_from([None, None, 5.0]),
        "max_uses": st.sampled_from([None, None, 1, 3]),
        "max_memory_mb": st.sampled_from([None, 150]),
    }
)
LIMITS = st.fixed_dictionaries(
    {
        "memory_mb": st.sampled_from([300, 700, 1500]),
        "max_concurrency": st.sampled_from([2, 4, 50]),
        "tenant_concurrency": st.sampled_from([None, 2]),
        "max_starts": st.integers(1, 3),
        "breaker_max_s": st.just(20.0),
        "journal_entries": st.sampled_from([0, 7, 60, 10_000]),
    }
)

NONSENSE = st.sampled_from(
    [
        Started("never"),
        StartFailed("never", ""),
        Stopped("never"),
        Released(10**9),
        Abandoned(10**9),
        Removed("never"),
        Scaled("never", 1, 1),
        Recycled("never"),
        BreakerReset("never"),
        Adopted("never", "never"),
        Deployed(RevisionSpec(revision="never", function="f", keepalive="magic")),
        Deployed(RevisionSpec(revision="never", function="f", slots=0)),
        Deployed(RevisionSpec(revision="never", function="f", reserved=10**6)),
    ]
)


class Machine(RuleBasedStateMachine):
    @initialize(limits=LIMITS, spec=SPECS, seed=st.integers(0, 3))
    def begin(self, limits: dict[str, Any], spec: dict[str, Any], seed: int) -> None:
        self.world = World(seed, **limits)
        self.names = 0
        self.foreign = 0
        self.draining = False
        self.deploy(spec)

    def pick(self, data: st.DataObject, options: Any) -> Any:
        return data.draw(st.sampled_from(sorted(options)))

    @property
    def revisions(self) -> list[str]:
        return self.world.core.revisions()

    @rule(spec=SPECS)
    def deploy(self, spec: dict[str, Any]) -> None:
        if len(self.revisions) < 4:
            self.names += 1
            try:
                self.world.deploy(f"r{self.names}", **spec)
            except ConfigurationError:
                assert f"r{self.names}" not in self.revisions

    @precondition(lambda self: self.revisions)
    @rule(data=st.data(), timeout_s=st.sampled_from([0.0, 0.3, 3.0, 60.0]), count=st.integers(1, 4))
    def invoke(self, data: st.DataObject, timeout_s: float, count: int) -> None:
        revision = self.pick(data, self.revisions)
        for _ in range(count):
            self.world.invoke(revision, timeout_s)

    @precondition(lambda self: self.world.granted)
    @rule(data=st.data(), healthy=st.booleans(), used=st.booleans(), after_s=st.sampled_from([0.0, 0.01, 1.0, 3.0]))
    def release(self, data: st.DataObject, healthy: bool, used: bool, after_s: float) -> None:
        self.world.release(self.pick(data, self.world.granted), after_s, healthy=healthy, used=used)

    @precondition(lambda self: self.world.waiting)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        invocation = self.pick(data, self.world.waiting)
        del self.world.waiting[invocation]
        self.world.do(Abandoned(invocation))

    @precondition(lambda self: self.world.starting)
    @rule(data=st.data(), after_s=st.sampled_from([0.0, 0.2, 2.0]))
    def start(self, data: st.DataObject, after_s: float) -> None:
        self.world.start(self.pick(data, self.world.starting), after_s)

    @precondition(lambda self: self.world.starting)
    @rule(data=st.data(), backend_fault=st.booleans(), permanent=st.booleans())
    def fail(self, data: st.DataObject, backend_fault: bool, permanent: bool) -> None:
        instance = self.pick(data, self.world.starting)
        self.world.fail(instance, backend_fault=backend_fault, permanent=permanent)

    @precondition(lambda self: self.world.stopping)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.world.stop(self.pick(data, self.world.stopping))

    @precondition(lambda self: self.world.core._ledger.instances)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.world.die(self.pick(data, self.world.core._ledger.instances))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), what=st.sampled_from(["frozen", "failed", "failed for good", "thawed", "sample"]))
    def news(self, data: st.DataObject, what: str) -> None:
        instance = self.pick(data, self.world.running)
        if what == "frozen":
            self.world.do(Frozen(instance))
        elif what == "thawed":
            self.world.do(Thawed(instance, 0.001))
        elif what == "sample":
            self.world.do(Sampled(instance, data.draw(st.sampled_from([10.0, 200.0]))))
        else:
            self.world.frozen.discard(instance)
            self.world.do(FreezeFailed(instance, permanent=what == "failed for good"))

    @precondition(lambda self: self.revisions and self.foreign < 5)
    @rule(data=st.data(), age_s=st.sampled_from([0.0, 100.0]))
    def adopt(self, data: st.DataObject, age_s: float) -> None:
        self.foreign += 1
        revision = self.pick(data, self.revisions)
        self.world.running[f"old-{self.foreign}"] = revision
        self.world.do(Adopted(f"old-{self.foreign}", revision, age_s))

    @precondition(lambda self: self.world.core.next_deadline() < math.inf)
    @rule()
    def tick(self) -> None:
        self.world.tick()

    @rule(seconds=st.sampled_from([0.01, 0.6, 40.0]))
    def late_tick(self, seconds: float) -> None:
        self.world.do(Ticked(), seconds)

    @precondition(lambda self: self.revisions)
    @rule(data=st.data(), low=st.integers(0, 2), spread=st.integers(0, 2))
    def scale(self, data: st.DataObject, low: int, spread: int) -> None:
        self.world.do(Scaled(self.pick(data, self.revisions), low, low + spread))

    @precondition(lambda self: self.revisions)
    @rule(data=st.data(), replace=st.booleans())
    def remove(self, data: st.DataObject, replace: bool) -> None:
        revision = self.pick(data, self.revisions)
        heirs = [name for name in self.revisions if name != revision]
        heir = self.pick(data, heirs) if replace and heirs else None
        if heir is not None:
            for invocation, asked in self.world.waiting.items():
                if asked == revision:
                    self.world.waiting[invocation] = heir
        self.world.do(Removed(revision, heir))

    @precondition(lambda self: self.revisions)
    @rule(data=st.data(), reset=st.booleans())
    def recycle_or_reset(self, data: st.DataObject, reset: bool) -> None:
        revision = self.pick(data, self.revisions)
        self.world.do(BreakerReset(revision) if reset else Recycled(revision))

    @rule(event=NONSENSE)
    def say_nonsense(self, event: Event) -> None:
        before = capture(self.world.core._ledger)
        with pytest.raises((InvariantError, ConfigurationError)):
            self.world.do(event)
        assert capture(self.world.core._ledger) == before

    @rule(up=st.booleans())
    def backend(self, up: bool) -> None:
        self.world.do(BackendUp() if up else BackendDown("no engine"))

    @rule(chance=st.integers(0, 20), keep=st.booleans())
    def drain(self, chance: int, keep: bool) -> None:
        if chance == 0:
            self.draining = True
            self.world.do(Drained(keep))

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.check_replay()
            self.check_drains()
        finally:
            del self.world

    def check_replay(self) -> None:
        """The journal's window gives the same actions again."""
        world = self.world
        run = Replay(dump(world.core))
        steps = list(iter(run.step, None))
        assert len(steps) <= world.limits.journal_entries
        assert steps == world.steps[len(world.steps) - len(steps) :]
        assert capture(run.scheduler._ledger) == capture(world.core._ledger)

    def check_drains(self) -> None:
        """When faults stop, everyone who waits is served or refused in time and the floors are reached."""
        world = self.world
        world.do(BackendUp())
        for revision in self.revisions:
            world.do(BreakerReset(revision))
        for _ in range(400):
            if world.starting:
                world.start(after_s=0.1)
            elif world.stopping:
                world.stop()
            elif world.granted:
                world.release(next(iter(world.granted)), after_s=0.1)
            elif world.waiting:
                world.tick()
            else:
                break
        assert not world.waiting
        assert not world.granted
        world.wait(1.0)
        self.check_floors()

    def check_floors(self) -> None:
        world = self.world
        for _ in range(200):
            if world.starting:
                world.start(after_s=0.01)
            elif world.stopping:
                world.stop()
            else:
                break
        ledger = world.core._ledger
        if self.draining:
            return
        for revision in ledger.revisions.values():
            if revision.floor_missing > 0:
                # Then not even the memory of everything above a floor would be enough.
                room_mb = ledger.host.memory_mb - ledger.host.memory_charged_mb
                room_mb += sum(
                    ledger.evictable(other) * other.spec.memory_mb
                    for other in ledger.revisions.values()
                    if other is not revision
                )
                assert room_mb < revision.spec.memory_mb, "a floor that could be reached is not"


Machine.TestCase.settings = settings(
    max_examples=250, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
TestCore = Machine.TestCase
