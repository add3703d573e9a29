"""A world around the core for tests: it carries actions out on paper, and objects to every unlawful one."""

from __future__ import annotations

import math
import random
from typing import Any

from scheduler.core import Scheduler
from scheduler.errors import ConfigurationError, InvariantError
from scheduler.messages import (
    Action,
    CancelStart,
    Deployed,
    Died,
    Event,
    Freeze,
    Grant,
    Invoked,
    Reject,
    Released,
    Start,
    Started,
    StartFailed,
    Stop,
    Stopped,
    Ticked,
)
from scheduler.model import HostLimits, InstanceState, RevisionSpec, StartKind, StopReason


class World:
    """What the pool would know: which instances run, stop, start; who holds what; who waits."""

    def __init__(self, seed: int = 0, **limits: Any) -> None:
        self.core = Scheduler(HostLimits(**limits), epoch="w", rng=random.Random(seed))
        self.limits = self.core.limits
        self.now = 100.0
        self.invocations = 0
        self.specs: dict[str, RevisionSpec] = {}
        self.starting: dict[str, str] = {}  # instance: revision
        self.running: dict[str, str] = {}
        self.stopping: dict[str, str] = {}
        self.frozen: set[str] = set()
        self.dead_alive: set[str] = set()  # died, and the core was told
        self.waiting: dict[int, str] = {}
        self.granted: dict[int, str] = {}
        self.kinds: dict[int, StartKind] = {}
        self.rejected: dict[int, Reject] = {}
        self.steps: list[tuple[float, Event, list[Action]]] = []

    # --- saying -------------------------------------------------------------------------------------------

    def do(self, event: Event, after_s: float = 0.0) -> list[Action]:
        """Tell the core, carry out what it says, and audit it."""
        self.now += after_s
        try:
            actions = self.core.handle(event, self.now)
        except (InvariantError, ConfigurationError):
            self.steps.append((self.now, event, []))
            raise
        self.steps.append((self.now, event, actions))
        for action in actions:
            self._carry_out(action, event)
        self.audit()
        if isinstance(event, Ticked):
            assert self.core.next_deadline() > self.now, "a tick must not call for itself"
        return actions

    def deploy(self, revision: str = "r", **spec: Any) -> list[Action]:
        made = RevisionSpec(revision=revision, **{"function": revision, **spec})
        self.specs[revision] = made
        return self.do(Deployed(made))

    def invoke(self, revision: str = "r", timeout_s: float = 10.0, after_s: float = 0.0) -> int:
        """A new invocation; its number. Look it up in granted, waiting or rejected."""
        self.do_invoke(revision, timeout_s, after_s)
        return self.invocations

    def do_invoke(self, revision: str = "r", timeout_s: float = 10.0, after_s: float = 0.0) -> list[Action]:
        """A new invocation; what the core says to it."""
        self.now += after_s
        self.invocations += 1
        self.waiting[self.invocations] = revision
        return self.do(Invoked(self.invocations, revision, self.now + timeout_s))

    def release(self, invocation: int, after_s: float = 0.0, **how: bool) -> list[Action]:
        del self.granted[invocation]
        return self.do(Released(invocation, **how), after_s)

    def start(self, instance: str | None = None, after_s: float = 1.0) -> list[Action]:
        """The oldest start, or that of `instance`, succeeds."""
        chosen = next(iter(self.starting)) if instance is None else instance
        self.running[chosen] = self.starting.pop(chosen)
        return self.do(Started(chosen), after_s)

    def start_all(self) -> None:
        while self.starting:
            self.start(after_s=0.0)

    def fail(self, instance: str | None = None, detail: str = "boom", **how: bool) -> list[Action]:
        chosen = next(iter(self.starting)) if instance is None else instance
        del self.starting[chosen]
        return self.do(StartFailed(chosen, detail, **how))

    def stop(self, instance: str | None = None) -> list[Action]:
        """The oldest stop, or that of `instance`, is done."""
        chosen = next(iter(self.stopping)) if instance is None else instance
        del self.stopping[chosen]
        self.dead_alive.discard(chosen)
        return self.do(Stopped(chosen))

    def die(self, instance: str) -> list[Action]:
        if instance in self.running:
            self.dead_alive.add(instance)
        return self.do(Died(instance, "exit status 1"))

    def tick(self) -> list[Action]:
        """Let time pass to the next deadline."""
        at = self.core.next_deadline()
        assert at < math.inf, "nothing is due"
        return self.do(Ticked(), max(0.0, at - self.now))

    def wait(self, seconds: float) -> list[Action]:
        """Let time pass, with every tick on the way."""
        until = self.now + seconds
        actions: list[Action] = []
        while (at := self.core.next_deadline()) <= until:
            actions += self.do(Ticked(), max(0.0, at - self.now))
        self.now = until
        return actions

    # --- doing --------------------------------------------------------------------------------------------

    def _carry_out(self, action: Action, event: Event) -> None:
        if isinstance(action, Grant):
            assert action.invocation in self.waiting, "granted twice, or not asked for"
            revision = self.waiting.pop(action.invocation)
            assert action.instance in self.running, f"granted {action.instance}, which does not run"
            assert action.instance not in self.dead_alive
            assert self.running[action.instance] == revision
            assert action.thaw == (action.instance in self.frozen)
            self.frozen.discard(action.instance)
            self.granted[action.invocation] = action.instance
            self.kinds[action.invocation] = action.start_kind
        elif isinstance(action, Reject):
            del self.waiting[action.invocation]
            self.rejected[action.invocation] = action
            assert action.retry_after_s is None or action.retry_after_s > 0
        elif isinstance(action, Start):
            assert action.instance not in self.starting
            self.starting[action.instance] = action.revision
        elif isinstance(action, CancelStart):
            self.stopping[action.instance] = self.starting.pop(action.instance)
        elif isinstance(action, Stop):
            assert action.instance in self.running, "a stop of what does not run"
            if action.reason is not StopReason.DIED:
                assert action.instance not in self.granted.values(), "stopped while serving"
            self.stopping[action.instance] = self.running.pop(action.instance)
            self.frozen.discard(action.instance)
        elif isinstance(action, Freeze):
            assert action.instance in self.running
            assert action.instance not in self.granted.values(), "frozen while serving"
            self.frozen.add(action.instance)

    # --- auditing -----------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Everything the core counts, counted again."""
        ledger = self.core._ledger
        host = ledger.host
        assert set(ledger.waiters) == set(self.waiting), "the queue and those who wait differ"
        assert set(ledger.leases) == set(self.granted), "leases and those who hold one differ"
        assert set(ledger.instances) == {*self.starting, *self.running, *self.stopping}
        records = [*ledger.revisions.values(), *ledger.retired]
        charged = sum(instance.revision.spec.memory_mb for instance in ledger.instances.values())
        assert host.memory_charged_mb == charged
        held = sum(r.spec.memory_mb for r in records for _ in r.stopping)
        assert host.memory_freeing_mb == held
        assert charged - held <= max(host.memory_mb, 0)
        assert host.starts_in_flight == sum(len(r.starting) for r in records) == len(self.starting)
        assert host.running == len(ledger.leases) <= host.max_concurrency
        shared = 0
        for function in ledger.functions.values():
            assert function.running == sum(r.running for r in function.revisions)
            shared += max(0, function.running - function.reserved)
        assert shared == host.shared_running
        for tenant in ledger.tenants.values():
            own = [r for r in records if r.tenant is tenant]
            assert tenant.revisions == len(own)
            assert tenant.running == sum(r.running for r in own)
            assert tenant.running <= tenant.limit
            assert all(r.blocked_in is tenant.blocked for r in tenant.blocked)
        assert all(r.blocked_in is host.blocked for r in host.blocked)
        assert all(r.blocked_in is host.owed for r in host.owed)
        assert sum(len(r.queue) for r in records) == len(ledger.waiters)
        for revision in records:
            self._audit_revision(revision)
        timers = ledger.timers
        live = sum(1 for at, entry, owner in timers.heap if owner.timer_id == entry)
        assert len(timers.heap) - live == timers._stale
        assert timers._stale <= live + 2 * 64 + 1
        for instance in ledger.instances.values():
            assert (instance.timer_id == 0) == (instance.timer_at == math.inf)

    def _audit_revision(self, revision: Any) -> None:
        spec = revision.spec
        present = [instance for index in revision.by_state.values() for instance in index]
        assert all(i.state is state for state, index in revision.by_state.items() for i in index)
        assert revision.live == sum(i.state is not InstanceState.STOPPING for i in present)
        assert revision.doomed_busy == sum(i.doomed is not None for i in revision.busy)
        assert revision.running == sum(1 for i, _ in self.core._ledger.leases.values() if i.revision is revision)
        for instance in present:
            held = sum(1 for i, _ in self.core._ledger.leases.values() if i is instance)
            assert instance.leases == held <= spec.slots
            if instance.state in (InstanceState.IDLE, InstanceState.FROZEN):
                assert held == 0
                assert instance.doomed is None
            if instance.state is InstanceState.BUSY:
                assert held > 0
            if spec.max_uses is not None:
                assert instance.uses <= spec.max_uses
        times = [instance.idle_since for instance in revision.idle]
        assert times == sorted(times)
        open_slots = {
            i for i in revision.busy if spec.slots > 1 and i.leases < spec.slots and i.doomed is None
        }  # fmt: skip
        assert {i for bucket in revision.partial for i in bucket} == open_slots
        assert revision.partial_mask == sum(1 << n for n, bucket in enumerate(revision.partial) if bucket)
        assert all(i.leases == n for n, bucket in enumerate(revision.partial) for i in bucket)
        if revision.removed:
            assert not revision.queue
            assert revision.total or revision.running, "a removed revision with nothing left is kept"
        if revision.queue:
            self._audit_queue(revision)

    def _audit_queue(self, revision: Any) -> None:
        """Nobody waits beside a free slot, and whoever waits waits for something."""
        ledger = self.core._ledger
        if revision.free_slots:
            assert revision.blocked_in is not None, "a free slot beside a queue"
        if revision.blocked_in is not None:
            blocked = revision.blocked_in
            host = ledger.host
            full = revision.tenant.running >= revision.tenant.limit or (
                host.running >= host.max_concurrency
                or (host.shared_running >= host.shared_max and revision.function.running >= revision.function.reserved)
            )
            assert full, "it waits for a limit that does not hold"
            assert revision in blocked
        most = max(spec.queue_max + 4 * spec.slots for spec in self.specs.values())
        assert len(revision.queue) <= most, "an unbounded queue"
        if not revision.running and not revision.total and not ledger.host.draining:
            wanted = revision in ledger.hungry
            timed = revision.timer_at < math.inf or ledger.host.timer_at < math.inf
            assert wanted or timed or revision.blocked_in is not None, "it waits for nothing"
