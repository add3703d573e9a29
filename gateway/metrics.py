"""Counters of the invocation path, and their Prometheus text, rendered in pieces so that no scrape stalls the loop.

Names follow Prometheus' conventions: base units (seconds, bytes), _total on counters, one HELP and TYPE for a
family and all its samples together.
"""

from __future__ import annotations

import resource
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from scheduler.model import InstanceState, StartKind

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PIECE_BYTES = 16_384
PIECE_LINES = 64  # at most so many are made before the loop gets its turn: about 0.1 ms

OK = "ok"
FUNCTION_ERROR = "function_error"
ERROR = "error"  # the pool's or the instance's: no proper answer


class Histogram:
    """Counts by bucket; observing is a bisection and two additions."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    @property
    def count(self) -> int:
        """How many were observed."""
        return sum(self.counts)


class FunctionMetrics:
    """What one function has done since the daemon started. Kept across its revisions."""

    __slots__ = ("durations", "outcomes", "rejected")

    def __init__(self) -> None:
        self.durations: dict[StartKind, Histogram] = {}
        self.outcomes: dict[tuple[StartKind, str], int] = {}
        self.rejected: dict[str, int] = {}

    def observe(self, kind: StartKind, outcome: str, seconds: float) -> None:
        """Count one invocation that got an instance; `seconds` from its arrival to its last byte."""
        histogram = self.durations.get(kind)
        if histogram is None:
            histogram = self.durations[kind] = Histogram()
        histogram.observe(seconds)
        key = (kind, outcome)
        self.outcomes[key] = self.outcomes.get(key, 0) + 1

    def reject(self, reason: str) -> None:
        """Count one invocation that got none. `reason` comes from RejectReason, so there are few."""
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def totals(self) -> dict[str, int]:
        """Invocations by start kind; every kind is there."""
        return {kind.value: self.durations[kind].count if kind in self.durations else 0 for kind in StartKind}

    def failures(self) -> int:
        """Invocations that got an instance and did not end well."""
        return sum(count for (_, outcome), count in self.outcomes.items() if outcome != OK)


class Metrics:
    """One FunctionMetrics for each deployed function: the invocation path keeps hold of its own."""

    def __init__(self) -> None:
        self.functions: dict[str, FunctionMetrics] = {}
        self.started_s = time.time()

    def of(self, function: str) -> FunctionMetrics:
        """The counters of a deployed function; made on first use."""
        found = self.functions.get(function)
        if found is None:
            found = self.functions[function] = FunctionMetrics()
        return found

    def keep_only(self, functions: Iterable[str]) -> None:
        """These are deployed: the series of others end, so that names do not pile up. An invocation that outlives
        its function counts for a name that was forgotten already, so ask now and then."""
        for gone in self.functions.keys() - set(functions):
            del self.functions[gone]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionGauges:
    """One function's present state."""

    function: str
    queued: int = 0
    instances: dict[str, int] = field(default_factory=dict)  # by InstanceState
    breaker_open: bool = False
    memory_bytes: int = 0  # charged


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGauges:
    """The host's present state."""

    version: str
    backend: str
    memory_charged_bytes: int = 0
    memory_limit_bytes: int = 0
    starts_in_flight: int = 0
    running: int = 0  # invocations
    max_concurrency: int = 0
    draining: bool = False
    uptime_s: float = 0.0


async def render(metrics: Metrics, functions: Sequence[FunctionGauges], host: HostGauges) -> AsyncIterator[bytes]:
    """The whole text, piece by piece, with a checkpoint before each."""
    piece: list[str] = []
    size = 0
    for line in _lines(metrics, functions, host):
        piece.append(line)
        size += len(line) + 1
        if size >= PIECE_BYTES:
            yield ("\n".join(piece) + "\n").encode()
            piece, size = [], 0
        elif len(piece) % PIECE_LINES == 0:
            await trio.lowlevel.checkpoint()
    if piece:
        yield ("\n".join(piece) + "\n").encode()


def _lines(metrics: Metrics, functions: Sequence[FunctionGauges], host: HostGauges) -> Iterator[str]:
    counters = [(label(name), one) for name, one in metrics.functions.items()]
    yield from _outcomes(counters)
    yield from _durations(counters)
    yield from _family("poold_rejected_total", "counter", "Invocations refused, by reason.")
    for name, one in counters:
        for reason, count in list(one.rejected.items()):
            yield f'poold_rejected_total{{function="{name}",reason="{label(reason)}"}} {count}'
    yield from _functions(functions)
    yield from _host(host)
    yield from _process(metrics.started_s)


def _outcomes(counters: Iterable[tuple[str, FunctionMetrics]]) -> Iterator[str]:
    yield from _family("poold_invocations_total", "counter", "Invocations that got an instance.")
    for name, one in counters:
        for (kind, outcome), count in list(one.outcomes.items()):
            yield (
                f'poold_invocations_total{{function="{name}",start_kind="{kind.value}",outcome="{outcome}"}} {count}'
            )


def _durations(counters: Iterable[tuple[str, FunctionMetrics]]) -> Iterator[str]:
    family = "poold_invocation_duration_seconds"
    yield from _family(family, "histogram", "From an invocation's arrival to the last byte of its answer.")
    for name, one in counters:
        for kind, histogram in list(one.durations.items()):
            counts, sum_s = list(histogram.counts), histogram.sum_s  # one moment: the loop may turn between lines
            labels = f'function="{name}",start_kind="{kind.value}"'
            total = 0
            for bound, count in zip(BUCKETS_S, counts, strict=False):
                total += count
                yield f'{family}_bucket{{{labels},le="{bound}"}} {total}'
            total += counts[-1]
            yield f'{family}_bucket{{{labels},le="+Inf"}} {total}'
            yield f"{family}_sum{{{labels}}} {sum_s:.9g}"
            yield f"{family}_count{{{labels}}} {total}"


def _functions(functions: Sequence[FunctionGauges]) -> Iterator[str]:
    names = [label(one.function) for one in functions]
    yield from _family("poold_queue_length", "gauge", "Invocations that wait for a slot.")
    for name, one in zip(names, functions, strict=True):
        yield f'poold_queue_length{{function="{name}"}} {one.queued}'
    yield from _family("poold_instances", "gauge", "Instances by state.")
    for name, one in zip(names, functions, strict=True):
        for state in InstanceState:
            if state is not InstanceState.DEAD:
                yield (
                    f'poold_instances{{function="{name}",state="{state.value}"}} {one.instances.get(state.value, 0)}'
                )
    yield from _family("poold_function_memory_bytes", "gauge", "Memory charged for a function's instances.")
    for name, one in zip(names, functions, strict=True):
        yield f'poold_function_memory_bytes{{function="{name}"}} {one.memory_bytes}'
    yield from _family("poold_breaker_open", "gauge", "1 while a crash loop keeps a function from starting.")
    for name, one in zip(names, functions, strict=True):
        yield f'poold_breaker_open{{function="{name}"}} {int(one.breaker_open)}'


def _host(host: HostGauges) -> Iterator[str]:
    yield from _family("poold_build_info", "gauge", "Always 1; the labels tell.")
    yield f'poold_build_info{{version="{label(host.version)}",backend="{label(host.backend)}"}} 1'
    for name, help_text, value in (
        ("poold_memory_charged_bytes", "Memory charged for all instances.", host.memory_charged_bytes),
        ("poold_memory_limit_bytes", "The memory budget.", host.memory_limit_bytes),
        ("poold_starts_in_flight", "Instances being started.", host.starts_in_flight),
        ("poold_running_invocations", "Invocations that hold a slot.", host.running),
        ("poold_running_invocations_limit", "How many may.", host.max_concurrency),
        ("poold_draining", "1 while the daemon goes down.", int(host.draining)),
        ("poold_uptime_seconds", "Since the daemon started.", round(host.uptime_s, 3)),
    ):
        yield from _family(name, "gauge", help_text)
        yield f"{name} {value}"


def _process(started_s: float) -> Iterator[str]:
    proc = Path("/proc/self")
    resident_pages = int((proc / "statm").read_text().split()[1])
    yield from _family("process_cpu_seconds_total", "counter", "CPU the daemon has used.")
    yield f"process_cpu_seconds_total {time.process_time():.3f}"
    for name, help_text, value in (
        ("process_resident_memory_bytes", "The daemon's resident memory.", resident_pages * resource.getpagesize()),
        ("process_start_time_seconds", "When the daemon started, since the epoch.", round(started_s, 3)),
        ("process_open_fds", "File descriptors the daemon holds.", len(list((proc / "fd").iterdir()))),
    ):
        yield from _family(name, "gauge", help_text)
        yield f"{name} {value}"


def _family(name: str, kind: str, help_text: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"


def label(value: str) -> str:
    """A label's value, escaped as the text format wants."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
