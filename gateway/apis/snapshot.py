"""The state of functions, instances and the host, as the API shows it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import trio

from gateway.apis.sources import Daemon, DeployedFunction, Pools, Registry
from gateway.apis.views import (
    Breaker,
    FunctionInfo,
    FunctionRow,
    InstanceCounts,
    InstanceInfo,
    MemoryInfo,
    OpenBreaker,
    StartTotals,
    State,
    Status,
)
from gateway.metrics import FunctionGauges, HostGauges, Metrics
from gateway.version import VERSION
from pool.spec import FunctionSpec
from scheduler.breaker import BreakerState
from scheduler.model import InstanceState, StartKind
from scheduler.stats import InstanceView, RevisionStats

MB = 1_048_576


def instances(pools: Pools) -> list[InstanceInfo]:
    """Every instance, by function and age."""
    return [_instance(view, pools) for view in _sorted(pools.instances())]


def rows(functions: Iterable[DeployedFunction], pools: Pools, metrics: Metrics) -> list[FunctionRow]:
    """Every function in short, by name."""
    by_function: dict[str, list[InstanceView]] = {}
    for view in pools.instances():
        by_function.setdefault(view.function, []).append(view)
    ordered = sorted(functions, key=lambda one: one.name)
    return [_row(one, pools.stats(one.revision.id), by_function.get(one.name, []), metrics) for one in ordered]


def function_info(function: DeployedFunction, pools: Pools, metrics: Metrics) -> FunctionInfo:
    """One function in full. Instances of a revision that is being replaced are shown too."""
    stats = pools.stats(function.revision.id)
    views = [view for view in pools.instances() if view.function == function.name]
    row = _row(function, stats, views, metrics)
    at = datetime.fromtimestamp(function.deployed_at_s, UTC)
    return FunctionInfo(
        name=row.name,
        state=row.state,
        revision=row.revision,
        contract=row.contract,
        runs=row.runs,
        min=row.min,
        max=row.max,
        instances=row.instances,
        queued=row.queued,
        running=row.running,
        totals=row.totals,
        errors=row.errors,
        rejected=row.rejected,
        problem=row.problem,
        digest=function.revision.artifact.digest,
        deployed_at=at.isoformat(timespec="seconds").replace("+00:00", "Z"),
        description=function.spec.description,
        spec=function.spec,
        breaker=Breaker(
            open=stats.breaker is not BreakerState.CLOSED,
            failures=stats.breaker_failures,
            retry_after_s=_until(stats),
            detail=stats.breaker_detail,
        ),
        estimates={"start_s": stats.start_s, "run_s": stats.service_s, "thaw_s": stats.thaw_s},
        rejected_by_reason=dict(metrics.of(function.name).rejected),
        instance_list=[_instance(view, pools) for view in _sorted(views)],
    )


def status(daemon: Daemon, registry: Registry, pools: Pools, metrics: Metrics) -> Status:
    """The daemon and its host."""
    host = pools.host_stats()
    functions = registry.list()
    counters = [metrics.of(one.name) for one in functions]
    totals = dict.fromkeys((kind.value for kind in StartKind), 0)
    for one in counters:
        for kind, count in one.totals().items():
            totals[kind] += count
    return Status(
        version=VERSION,
        backend=daemon.backend_name,
        backend_reason=daemon.backend_reason,
        isolation=daemon.isolation,
        engine=daemon.engine,
        engine_problem=daemon.engine_problem,
        listen=list(daemon.listen),
        pid=os.getpid(),
        uptime_s=round(daemon.uptime_s, 3),
        draining=daemon.draining,
        functions=len(functions),
        instances=_counts(pools.instances()),
        memory=MemoryInfo(charged_mb=host.memory_charged_mb, limit_mb=host.memory_mb),
        running=host.running,
        max_concurrency=host.max_concurrency,
        queued=host.queued,
        starts_in_flight=host.starts_in_flight,
        max_starts=host.max_starts,
        totals=StartTotals(**totals),
        errors=sum(one.failures() for one in counters),
        rejected=sum(sum(one.rejected.values()) for one in counters),
        breakers=_breakers(functions, pools),
        warnings=list(daemon.warnings()),
    )


def gauges(functions: Iterable[DeployedFunction], pools: Pools) -> list[FunctionGauges]:
    """Every function's present state, for /metrics."""
    found = []
    for one in functions:
        stats = pools.stats(one.revision.id)
        found.append(
            FunctionGauges(
                function=one.name,
                queued=stats.queued,
                instances={state.value: count for state, count in stats.instances.items()},
                breaker_open=stats.breaker is not BreakerState.CLOSED,
                memory_bytes=stats.memory_mb * MB,
            )
        )
    return found


def host_gauges(daemon: Daemon, pools: Pools) -> HostGauges:
    """The host's present state, for /metrics."""
    host = pools.host_stats()
    return HostGauges(
        version=VERSION,
        backend=daemon.backend_name,
        memory_charged_bytes=host.memory_charged_mb * MB,
        memory_limit_bytes=host.memory_mb * MB,
        starts_in_flight=host.starts_in_flight,
        running=host.running,
        max_concurrency=host.max_concurrency,
        draining=daemon.draining,
        uptime_s=daemon.uptime_s,
    )


def _row(
    function: DeployedFunction, stats: RevisionStats, views: Sequence[InstanceView], metrics: Metrics
) -> FunctionRow:
    counters = metrics.of(function.name)
    counts = _counts(views)
    return FunctionRow(
        name=function.name,
        state="failing" if function.problem else _state(stats, counts),
        revision=function.revision.id,
        contract=function.spec.contract,
        runs=_runs(function.spec),
        min=stats.min_instances,
        max=stats.max_instances,
        instances=counts,
        queued=stats.queued,
        running=stats.running,
        totals=StartTotals(**counters.totals()),
        errors=counters.failures(),
        rejected=sum(counters.rejected.values()),
        problem=function.problem,
    )


def _state(stats: RevisionStats, counts: InstanceCounts) -> State:
    if stats.removed:
        return "removing"
    if stats.breaker is not BreakerState.CLOSED:
        return "failing"
    if counts.idle or counts.frozen or counts.busy:
        return "ready"
    return "starting" if counts.starting else "empty"


def _runs(spec: FunctionSpec) -> str:
    if spec.code is None:
        return spec.image or ""
    return f"code on {spec.image}" if spec.image else "code"


def _counts(views: Iterable[InstanceView]) -> InstanceCounts:
    counts = InstanceCounts()
    for view in views:
        if view.state is not InstanceState.DEAD:
            setattr(counts, view.state.value, getattr(counts, view.state.value) + 1)
    return counts


def _instance(view: InstanceView, pools: Pools) -> InstanceInfo:
    now_s = trio.current_time()
    prepared = pools.find_instance(view.id)
    return InstanceInfo(
        id=view.id,
        function=view.function,
        revision=view.revision,
        state=view.state,
        slots=view.slots,
        used=view.leases,
        uses=view.uses,
        age_s=round(max(0.0, now_s - view.started_at), 3),
        idle_s=None if view.idle_since is None else round(max(0.0, now_s - view.idle_since), 3),
        pid=prepared.running.pid if prepared is not None else None,
        memory_mb=None if view.memory_mb is None else round(view.memory_mb, 1),
        stopping_because=view.doomed,
    )


def _sorted(views: Iterable[InstanceView]) -> list[InstanceView]:
    return sorted(views, key=lambda view: (view.function, view.started_at, view.id))


def _until(stats: RevisionStats) -> float | None:
    if stats.breaker_until is None:
        return None
    return round(max(0.0, stats.breaker_until - trio.current_time()), 3)


def _breakers(functions: Iterable[DeployedFunction], pools: Pools) -> list[OpenBreaker]:
    found = []
    for one in functions:
        stats = pools.stats(one.revision.id)
        if stats.breaker is not BreakerState.CLOSED:
            found.append(
                OpenBreaker(
                    function=one.name,
                    revision=one.revision.id,
                    failures=stats.breaker_failures,
                    retry_after_s=_until(stats),
                    detail=stats.breaker_detail,
                )
            )
    return found
