"""`poolbench start`: what each kind of start costs, beside a plain start of the same function."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import report, workload
from bench.asker import Asker, NoAnswer
from bench.daemon import DaemonFailed, Poold, poold_to_measure
from bench.plain import plain_start
from bench.workload import Workload
from pool.spec import PoolSpec

OnProgress = Callable[[str], None]
Instances = list[dict[str, Any]]

ATTEMPTS = 5  # for one sample: an answer of another kind is not counted
STAGES = ("queue", "start", "connect", "init", "thaw", "run")
KEEP_S = 3600.0


class NoSample(Exception):
    """A kind of start could not be brought about."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of start: how its pool is set up, when an invocation will be of this kind, and what it is called."""

    name: str
    kind: str  # what X-Poold-Start must say
    pool: PoolSpec
    state: str  # of the instance that will be taken; "" when there must be none
    used: bool  # whether it has served before
    first: bool  # whether it is the instance's first answer


ROWS = (
    Row("warm", "warm", PoolSpec(min=1, max=1, freeze_after_s=None, keepalive_s=KEEP_S), "idle", True, False),
    Row("thawed", "thawed", PoolSpec(min=1, max=1, freeze_after_s=0.0, keepalive_s=KEEP_S), "frozen", True, False),
    Row("prewarmed", "prewarmed", PoolSpec(min=1, max=2, freeze_after_s=None, max_uses=1), "idle", False, True),
    Row(
        "prewarmed, frozen", "prewarmed", PoolSpec(min=1, max=2, freeze_after_s=0.0, max_uses=1), "frozen", False, True
    ),
    Row("cold", "cold", PoolSpec(min=0, max=1, freeze_after_s=None, max_uses=1), "", False, True),
)
PLAIN = "plain start"


@dataclass(frozen=True, slots=True)
class Course:
    """How it is measured: so many rounds, and so long a rest before each sample. A pre-started instance has mostly
    been there for a while; right after its start the engine still has something to do."""

    samples: int
    settle_s: float


@dataclass(slots=True)
class Samples:
    """What was seen of one row, in milliseconds."""

    latency_ms: list[float] = field(default_factory=list)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)
    other_kinds: int = 0  # answers of another kind, not counted

    def add(self, latency_ms: float, stages: dict[str, float]) -> None:
        """One sample."""
        self.latency_ms.append(latency_ms)
        for stage, duration_ms in stages.items():
            self.stages_ms.setdefault(stage, []).append(duration_ms)


@dataclass(slots=True)
class Measured:
    """A whole run."""

    rows: dict[str, Samples] = field(default_factory=dict)
    plain_ms: list[float] = field(default_factory=list)
    own_first_ms: list[float] = field(default_factory=list)  # the function itself, its first answer
    own_ms: list[float] = field(default_factory=list)  # the function itself, later answers


class Kind:
    """One row at work: its deployed variant and the connection it is asked by."""

    def __init__(self, poold: Poold, work: Workload, row: Row, number: int) -> None:
        """Deploys it. Raises ClientError, DaemonFailed."""
        self.row = row
        self.samples = Samples()
        self._poold = poold
        self._work = work
        self.spec = work.variant(f"{number}", row.pool)
        poold.deploy(self.spec, work.code)
        self._asker = Asker(poold.target())

    def ready(self, instances: Instances) -> bool:
        """Whether the next invocation will be of this kind, and nothing else is going on in the pool."""
        row = self.row
        if not row.state:
            return not instances
        if len(instances) != row.pool.min:
            return False
        return all(one["state"] == row.state and bool(one["uses"]) == row.used for one in instances)

    def settled(self, instances: Instances) -> bool:
        """Nothing starts or stops, and the floor is there."""
        at_rest = all(one["state"] in ("idle", "frozen") for one in instances)
        return at_rest and len(instances) == self.row.pool.min

    def first_use(self) -> None:
        """Kinds that need a used instance get one."""
        self._poold.wait(self.spec.name, self.settled)
        if self.row.used:
            self._ask()

    def sample(self) -> None:
        """One answer of this kind, at rest. Raises NoSample, NoAnswer, DaemonFailed."""
        for _ in range(ATTEMPTS):
            self._poold.wait(self.spec.name, self.ready)
            kind, latency_ms, stages = self._ask()
            if kind == self.row.kind:
                self.samples.add(latency_ms, stages)
                return
            self.samples.other_kinds += 1
        raise NoSample(f"{self.row.name}: {ATTEMPTS} invocations in a row were of another kind, the last {kind!r}")

    def _ask(self) -> tuple[str, float, dict[str, float]]:
        ask = self._work.ask
        answer = self._asker.ask(
            ask.method, ask.poold_path(self.spec.name), ask.body, ask.headers if not ask.event else ()
        )
        if answer.status >= 500 or not answer.kind:
            text = answer.body[:300].decode("utf-8", "replace")
            raise NoAnswer(f"{self.spec.name} answered {answer.status}: {text}")
        return answer.kind, answer.latency_ms, answer.stages

    def close(self) -> None:
        """Close the connection."""
        self._asker.close()


def measure(poold: Poold, work: Workload, backend: str, course: Course, tell: OnProgress) -> tuple[Measured, str]:
    """Rounds of one sample of each kind and one plain start, each when everything else is at rest."""
    measured = Measured()
    with contextlib.ExitStack() as stack:
        kinds: list[Kind] = []
        for number, row in enumerate(ROWS):
            tell(f"deploying {work.spec.name} for {row.name}")
            kind = Kind(poold, work, row, number)
            stack.callback(kind.close)
            kinds.append(kind)
        for kind in kinds:
            kind.first_use()
            measured.rows[kind.row.name] = kind.samples
        (model,) = poold.wait(kinds[0].spec.name, kinds[0].settled)
        plain = stack.enter_context(plain_start(work, backend, model["id"]))
        plain.ask()  # its first answer is another matter
        for round_number in range(course.samples):
            shift = round_number % len(kinds)
            for kind in kinds[shift:] + kinds[:shift]:
                tell(f"round {round_number + 1} of {course.samples}: {kind.row.name}")
                _rest(poold, kinds, course.settle_s)
                kind.sample()
            tell(f"round {round_number + 1} of {course.samples}: {PLAIN}")
            _rest(poold, kinds, course.settle_s)
            measured.own_ms.append(plain.ask())
            _rest(poold, kinds, course.settle_s)
            measured.plain_ms.append(plain.sample())
            _rest(poold, kinds, 0.0)
            measured.own_first_ms.append(plain.first(course.settle_s))
        return measured, plain.describe()


def _rest(poold: Poold, kinds: list[Kind], settle_s: float) -> None:
    """Wait until no pool has anything to do: a refill would be measured along with the sample."""
    for kind in kinds:
        poold.wait(kind.spec.name, kind.settled)
    time.sleep(settle_s)


def run(
    work_of: Callable[[Path], Workload], host: str | None, backend: str, course: Course, tell: OnProgress
) -> dict[str, Any]:
    """The whole measurement. Raises NoSample, NoAnswer, PlainFailed, BadWorkload, DaemonFailed, ClientError."""
    with tempfile.TemporaryDirectory(prefix="poolbench-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        work = work_of(directory)
        tell("starting poold")
        with poold_to_measure(host, backend) as poold:
            facts = poold.facts()
            measured, plain = measure(poold, work, facts["backend"], course, tell)
            return as_result(work.spec.name, report.machine(**facts), measured, course, plain)


def summary(values: list[float]) -> dict[str, float]:
    """{"count", "min", "p50", "p90", "p99", "max"} of a few samples."""
    found: dict[str, float] = {"count": len(values), "min": round(min(values), 4)}
    for percent in (50, 90, 99):
        found[f"p{percent}"] = round(report.percentile(values, percent), 4)
    return {**found, "max": round(max(values), 4)}


def as_result(
    function: str, facts: dict[str, Any], measured: Measured, course: Course, plain_is: str
) -> dict[str, Any]:
    """The JSON. `above_own_ms`: at p50 and p99, more than the function itself takes for such an answer."""
    plain = summary(measured.plain_ms)
    own = {"first": summary(measured.own_first_ms), "later": summary(measured.own_ms)}
    rows = []
    for row in ROWS:
        seen = measured.rows[row.name]
        shown = summary(seen.latency_ms)
        base = own["first" if row.first else "later"]
        rows.append(
            {
                "start": row.name,
                "latency_ms": shown,
                "plain_to_this": round(plain["p50"] / shown["p50"], 1),
                "above_own_ms": {at: round(shown[at] - base["p50"], 4) for at in ("p50", "p99")},
                "stages_ms": {stage: summary(values) for stage, values in seen.stages_ms.items()},
                "other_kinds": seen.other_kinds,
                "samples_ms": [round(value, 4) for value in seen.latency_ms],
            }
        )
    return report.result(
        "start",
        facts,
        function=function,
        samples=course.samples,
        settle_s=course.settle_s,
        plain={"is": plain_is, "latency_ms": plain, "samples_ms": [round(value, 4) for value in measured.plain_ms]},
        own_ms=own,
        rows=rows,
    )


def show(result: dict[str, Any]) -> None:
    """For people."""
    out = report.console()
    columns = ("min", "p50", "p90", "p99", "max")
    rows = []
    for row in result["rows"]:
        latency, above = row["latency_ms"], row["above_own_ms"]
        times = [report.ms(latency[column]) for column in columns]
        rows.append(
            [row["start"], *times, report.ms(above["p50"]), report.ms(above["p99"]), f"{row['plain_to_this']:,.0f}x"]
        )
    plain = result["plain"]["latency_ms"]
    rows.append([PLAIN, *(report.ms(plain[column]) for column in columns), "-", "-", "1x"])
    for name, which in (("function, first", "first"), ("function, later", "later")):
        own = result["own_ms"][which]
        rows.append([name, *(report.ms(own[column]) for column in columns), "-", "-", "-"])
    title = f"{result['function']}: first byte sent to answer read, ms; {result['samples']} samples each, interleaved"
    heads = ("start", *columns, "p50 - own", "p99 - own", "plain / p50")
    report.print_table(out, title, heads, rows)
    stages = [
        [
            row["start"],
            *(report.ms(row["stages_ms"][name]["p50"]) if name in row["stages_ms"] else "-" for name in STAGES),
        ]
        for row in result["rows"]
    ]
    report.print_table(out, "stages, p50 in ms", ("start", *STAGES), stages)
    out.print(f"plain start: {result['plain']['is']}", style="dim", markup=False)
    out.print("function: asked directly; own: the median of its own such answer (first or later)", style="dim")
    out.print(report.machine_line(result["machine"]), style="dim", markup=False)


FAILURES = (NoSample, NoAnswer, DaemonFailed)


def builtin_or(path: Path | None, method: str | None, target: str, body: bytes | None) -> Callable[[Path], Workload]:
    """How to come by the workload, once there is a directory for the built-in one."""
    if path is None:
        return workload.builtin
    return lambda directory: workload.load(path, method=method, target=target, body=body)
