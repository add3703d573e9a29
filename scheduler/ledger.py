"""The books: every record, the indexes over them, what is charged and what runs."""

from __future__ import annotations

import math

from scheduler.breaker import Breaker
from scheduler.errors import ConfigurationError, InvariantError
from scheduler.keepalive import IdleFacts, policy_named
from scheduler.lifecycle import transition
from scheduler.model import HostLimits, InstanceState, RevisionSpec, StopReason
from scheduler.records import (
    UNLIMITED,
    Function,
    Host,
    Instance,
    Lease,
    Revision,
    Tenant,
    Waiter,
)
from scheduler.timers import Timers

_S = InstanceState


class Ledger:
    """Owns the records. Whoever changes a state or a count goes through it, except the grant and release of a
    slot, which serving.py writes out for speed."""

    def __init__(self, limits: HostLimits, epoch: str) -> None:
        self.limits = limits
        self.epoch = epoch
        self.revisions: dict[str, Revision] = {}  # deployed, by name
        self.retired: dict[Revision, None] = {}  # removed, but instances or leases are left
        self.instances: dict[str, Instance] = {}
        self.leases: dict[int, Lease] = {}  # by invocation
        self.waiters: dict[int, Waiter] = {}  # by invocation
        self.functions: dict[tuple[str, str], Function] = {}  # by tenant and name
        self.tenants: dict[str, Tenant] = {}
        self.hungry: dict[Revision, None] = {}  # want a start that somebody waits for, in turn
        self.refill: dict[Revision, None] = {}  # below their floor, in turn
        self.timers = Timers()
        self.instance_count = 0
        self.waiter_count = 0
        self.revision_count = 0
        self.host = Host(
            max_concurrency=limits.max_concurrency,
            memory_mb=limits.memory_mb,
            max_starts=limits.max_starts,
            shared_max=limits.max_concurrency,
            breaker=self.new_breaker(),
        )

    def new_breaker(self) -> Breaker:
        limits = self.limits
        return Breaker(limits.breaker_failures, limits.breaker_base_s, limits.breaker_max_s)

    # --- revisions ----------------------------------------------------------------------------------------

    def add_revision(self, spec: RevisionSpec) -> Revision:
        """Raises InvariantError (known already) and ConfigurationError (an unknown policy, too much reserved)."""
        if spec.revision in self.revisions:
            raise InvariantError(f"revision {spec.revision} is deployed already")
        policy_named(spec.keepalive)
        self._check_reserved(spec)
        revision = self.new_revision(spec)
        self.revisions[spec.revision] = revision
        self.recount_reserved()
        return revision

    def new_revision(self, spec: RevisionSpec) -> Revision:
        """A record with its function and tenant; not deployed yet."""
        policy = policy_named(spec.keepalive)
        function = self.functions.setdefault((spec.tenant, spec.function), Function(name=spec.function))
        by_state: dict[InstanceState, dict[Instance, None]] = {
            state: {} for state in InstanceState if state is not _S.DEAD
        }
        keep_s = policy.keep_s(spec)
        self.revision_count += 1
        revision = Revision(
            number=self.revision_count,
            spec=spec,
            function=function,
            tenant=self.tenant_named(spec.tenant),
            policy=policy,
            breaker=self.new_breaker(),
            slots=spec.slots,
            min_instances=spec.min_instances,
            max_instances=spec.max_instances,
            max_uses=UNLIMITED if spec.max_uses is None else spec.max_uses,
            idle_delay=keep_s if spec.freeze_after_s is None else min(keep_s, spec.freeze_after_s),
            by_state=by_state,
            starting=by_state[_S.STARTING],
            idle=by_state[_S.IDLE],
            busy=by_state[_S.BUSY],
            frozen=by_state[_S.FROZEN],
            stopping=by_state[_S.STOPPING],
            partial=[{} for _ in range(spec.slots)] if spec.slots > 1 else [],
        )
        revision.tenant.revisions += 1
        function.revisions[revision] = None
        return revision

    def _check_reserved(self, spec: RevisionSpec) -> None:
        key = (spec.tenant, spec.function)
        others = sum(function.reserved for known, function in self.functions.items() if known != key)
        if others + spec.reserved > self.limits.max_concurrency:
            raise ConfigurationError(
                f"function {spec.function} reserves {spec.reserved} invocations at a time, but of the host's "
                f"{self.limits.max_concurrency} only {self.limits.max_concurrency - others} are not reserved yet"
            )

    def tenant_named(self, name: str) -> Tenant:
        tenant = self.tenants.get(name)
        if tenant is None:
            limit = self.limits.tenant_overrides.get(name, self.limits.tenant_concurrency)
            tenant = self.tenants[name] = Tenant(name=name, limit=UNLIMITED if limit is None else limit)
        return tenant

    def recount_reserved(self) -> None:
        """Work out anew what is kept free for functions, after a revision came or went."""
        host = self.host
        reserved = shared = 0
        for function in self.functions.values():
            function.reserved = max((r.spec.reserved for r in function.revisions if not r.removed), default=0)
            reserved += function.reserved
            shared += max(0, function.running - function.reserved)
        host.shared_max = host.max_concurrency - reserved
        host.shared_running = shared

    def retire_revision(self, revision: Revision) -> None:
        """It takes no more invocations; it is forgotten when nothing of it is left."""
        revision.removed = True
        revision.min_instances = 0
        del self.revisions[revision.spec.revision]
        self.retired[revision] = None
        self.hungry.pop(revision, None)
        self.refill.pop(revision, None)
        self.timers.disarm(revision)
        self.recount_reserved()

    def forget_if_gone(self, revision: Revision) -> None:
        if not revision.removed or revision.running or revision.total:
            return
        if self.retired.pop(revision, self) is self:
            return
        spec = revision.spec
        function = revision.function
        del function.revisions[revision]
        if not function.revisions:
            del self.functions[spec.tenant, spec.function]
        revision.tenant.revisions -= 1
        if not revision.tenant.revisions:
            del self.tenants[spec.tenant]

    # --- instances ----------------------------------------------------------------------------------------

    def add_instance(
        self, revision: Revision, now: float, *, identity: str | None = None, age_s: float = 0.0, awaited: bool = False
    ) -> Instance:
        """A starting instance, its memory charged. `identity`: it exists already and brings its own id."""
        host = self.host
        self.instance_count += 1
        number = self.instance_count
        max_age_s = revision.spec.max_age_s
        instance = Instance(
            id=f"{self.epoch}-{number:x}" if identity is None else identity,
            number=number,
            revision=revision,
            started_at=now - age_s,
            age_at=math.inf if max_age_s is None else now - age_s + max_age_s,
            awaited=awaited,
        )
        self.instances[instance.id] = instance
        revision.starting[instance] = None
        revision.live += 1
        host.starts_in_flight += 1
        host.memory_charged_mb += revision.spec.memory_mb
        return instance

    def move(self, instance: Instance, to: InstanceState) -> None:
        """Set a state and keep every index and count in step with it."""
        revision = instance.revision
        host = self.host
        origin = instance.state
        transition(instance, to)
        del revision.by_state[origin][instance]
        if to is _S.DEAD:
            del self.instances[instance.id]
            host.memory_charged_mb -= revision.spec.memory_mb
        else:
            revision.by_state[to][instance] = None
        if origin is _S.STARTING:
            host.starts_in_flight -= 1
            if to is _S.DEAD:
                revision.live -= 1
        elif origin is _S.BUSY:
            if instance.doomed is not None:
                revision.doomed_busy -= 1
            self.drop_partial(instance)
        elif origin is _S.STOPPING:
            host.memory_freeing_mb -= revision.spec.memory_mb
        if to is _S.STOPPING:
            revision.live -= 1
            host.memory_freeing_mb += revision.spec.memory_mb
        if to is _S.STOPPING or to is _S.DEAD:
            self.timers.disarm(instance)

    def doom(self, instance: Instance, reason: StopReason) -> None:
        """It takes no new lease and stops for this reason when it falls idle. The first reason stays."""
        if instance.doomed is not None:
            return
        instance.doomed = reason
        if instance.state is _S.BUSY:
            instance.revision.doomed_busy += 1
            self.drop_partial(instance)

    def spare(self, instance: Instance) -> None:
        """Take a doom back: the last of its uses turned out to be none."""
        instance.doomed = None
        instance.revision.doomed_busy -= 1

    def drop_partial(self, instance: Instance) -> None:
        """Out of the index of busy instances with a free slot, if it is there."""
        revision = instance.revision
        if revision.slots > 1 and 0 < instance.leases < revision.slots:
            bucket = revision.partial[instance.leases]
            if bucket.pop(instance, self) is None and not bucket:
                revision.partial_mask &= ~(1 << instance.leases)

    def add_partial(self, instance: Instance) -> None:
        """Into that index, when it is busy, has a free slot and may take a lease."""
        revision = instance.revision
        leases = instance.leases
        if 0 < leases < revision.slots and instance.doomed is None:
            revision.partial[leases][instance] = None
            revision.partial_mask |= 1 << leases

    def back_to_idle(self, instance: Instance) -> None:
        """Frozen to idle, at its place in the order of last use."""
        idle = instance.revision.idle
        last = next(reversed(idle), None)
        self.move(instance, _S.IDLE)
        if last is not None and last.idle_since > instance.idle_since:
            ordered = sorted(idle, key=lambda each: each.idle_since)
            idle.clear()
            idle.update(dict.fromkeys(ordered))

    # --- eviction -----------------------------------------------------------------------------------------

    def evictable(self, revision: Revision) -> int:
        """How many of its idle instances stand above the floor, and are not wanted by its own queue (which
        waits for a limit, else they would not be idle)."""
        idle = len(revision.idle) + len(revision.frozen)
        if not idle:
            return 0
        wanted = -(-len(revision.queue) // revision.slots)
        return max(0, min(idle - wanted, revision.ready - revision.min_instances))

    def eviction_rank(self, instance: Instance) -> tuple[float, int]:
        revision = instance.revision
        facts = IdleFacts(instance.idle_since, instance.uses, revision.spec.memory_mb)
        return (revision.policy.rank(facts), instance.number)

    def idle_by_rank(self, revision: Revision) -> list[Instance]:
        """Its idle and frozen instances, the one to go first at the front."""
        return sorted((*revision.frozen, *revision.idle), key=self.eviction_rank)
