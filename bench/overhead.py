"""`poolbench overhead`: what poold adds to a request, beside what a bare proxy in the same language adds."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench import load, report, workload
from bench.daemon import Poold, poold_to_measure
from bench.engine import Engine
from bench.target import Plan
from pool.spec import PoolSpec

CONNECTIONS = (1, 8, 32)
TARGETS = ("direct", "proxy", "poold")
SLOTS = 64  # more than the most connections: one instance serves all, as the one upstream of the proxy does
WARM_UP_S = 0.2

OnProgress = Callable[[str], None]


class TargetFailed(Exception):
    """Something that was to be measured did not answer as it should."""


@dataclass(slots=True)
class Series:
    """One target at one number of connections: a value for each round."""

    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    requests_per_s: list[float] = field(default_factory=list)
    generator_cpu: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)  # of the target's own process, for each request

    def medians(self) -> dict[str, float]:
        """Over the rounds."""
        return {
            "p50_ms": round(statistics.median(self.p50_ms), 4),
            "p99_ms": round(statistics.median(self.p99_ms), 4),
            "requests_per_s": round(statistics.median(self.requests_per_s), 1),
            "generator_cpu": round(statistics.median(self.generator_cpu), 2),
            "cpu_us": round(statistics.median(self.cpu_us), 1),
        }


Measured = dict[int, dict[str, Series]]  # connections -> target -> series


@dataclass(frozen=True, slots=True)
class Program:
    """Something to measure: where it is asked, and the process whose time it takes."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """What it has used so far; its children are not its own time."""
        times = self.process.cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def printing_server(command: Sequence[str], env: dict[str, str] | None = None) -> Iterator[Program]:
    """A program that prints "listening on HOST:PORT" first. Ends it at the end. Raises TargetFailed."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().decode("utf-8", "replace").strip()
        address = line.removeprefix("listening on ")
        if address == line:
            raise TargetFailed(f"{' '.join(command)} did not start: {line or 'it said nothing'}")
        yield Program(f"http://{address}/", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def order_of(round_number: int) -> tuple[str, ...]:
    """Who is measured first moves on each round, so that nobody always follows the same neighbour."""
    shift = round_number % len(TARGETS)
    return TARGETS[shift:] + TARGETS[:shift]


def one(program: Program, connections: int, duration_s: float, series: Series) -> None:
    """One measurement. Raises TargetFailed."""
    url = program.url
    before_s = program.cpu_s()
    outcome = Engine(Plan(url=url, connections=connections, duration_s=duration_s)).run()  # a Ctrl-C ends the whole run
    if outcome.errors or not outcome.answers:
        errors = ", ".join(f"{kind} {count}" for kind, count in outcome.errors.items()) or "no answers"
        raise TargetFailed(f"{url} failed under load: {errors}")
    result = load.as_result(Plan(url=url), outcome, 1)
    series.p50_ms.append(result["latency_ms"]["all"]["p50"])
    series.p99_ms.append(result["latency_ms"]["all"]["p99"])
    series.requests_per_s.append(result["requests_per_s"])
    series.generator_cpu.append(result["generator_cpu"])
    series.cpu_us.append((program.cpu_s() - before_s) / outcome.answers * 1e6)


def measure(programs: dict[str, Program], rounds: int, duration_s: float, tell: OnProgress) -> Measured:
    """Rounds of every target at every number of connections, interleaved. Raises TargetFailed."""
    measured: Measured = {count: {target: Series() for target in TARGETS} for count in CONNECTIONS}
    for target in TARGETS:
        one(programs[target], max(CONNECTIONS), WARM_UP_S, Series())
    for number in range(rounds):
        for connections in CONNECTIONS:
            for target in order_of(number):
                tell(f"round {number + 1} of {rounds}: {target}, {connections} connections")
                one(programs[target], connections, duration_s, measured[connections][target])
    return measured


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """For each number of connections: medians of each target, and the medians of the rounds' ratios."""
    rows = []
    for connections, targets in measured.items():
        ratios: dict[str, dict[str, float | None]] = {}
        for above, below in (("poold", "proxy"), ("poold", "direct"), ("proxy", "direct")):
            ratios[f"{above}/{below}"] = {
                name: _rounded(report.median_ratio(getattr(targets[above], name), getattr(targets[below], name)))
                for name in ("p50_ms", "p99_ms", "requests_per_s", "cpu_us")
            }
        row = {"connections": connections, **{target: series.medians() for target, series in targets.items()}}
        rows.append({**row, "ratios": ratios})
    return rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def run(host: str | None, backend: str, rounds: int, duration_s: float, tell: OnProgress) -> dict[str, Any]:
    """The whole comparison. Raises TargetFailed, DaemonFailed, ClientError."""
    with tempfile.TemporaryDirectory(prefix="poolbench-") as name, contextlib.ExitStack() as stack:
        os.chmod(name, 0o711)
        work = workload.builtin(Path(name))
        assert work.code is not None
        tell("starting the function, the proxy and poold")
        env = {**os.environ, "HOST": "127.0.0.1", "PORT": "0"}
        direct = stack.enter_context(printing_server([str(work.code / "bootstrap")], env))
        proxy = stack.enter_context(
            printing_server([sys.executable, "-m", "bench.proxy", "--upstream", urlsplit(direct.url).netloc])
        )
        poold: Poold = stack.enter_context(poold_to_measure(host, backend))
        spec = work.variant("overhead", PoolSpec(min=1, max=1, freeze_after_s=None), concurrency=SLOTS)
        poold.deploy(spec, work.code)
        url = f"http://{poold.target().host}/fn/{spec.name}/"
        programs = {"direct": direct, "proxy": proxy, "poold": Program(url, poold.process())}
        facts = report.machine(**poold.facts())
        measured = measure(programs, rounds, duration_s, tell)
    return report.result(
        "overhead", facts, rounds=rounds, duration_s=duration_s, rows=rows_of(measured), warnings=warnings(measured)
    )


def warnings(measured: Measured) -> list[str]:
    """What the reader must know."""
    busy = [
        f"{target} at {connections}"
        for connections, targets in measured.items()
        for target, series in targets.items()
        if statistics.median(series.generator_cpu) > load.BUSY
    ]
    if not busy:
        return []
    return [f"the generator used more than {load.BUSY:.0%} of a core ({', '.join(busy)}): it limits those figures"]


def show(result: dict[str, Any]) -> None:
    """For people."""
    out = report.console()
    rows = []
    for row in result["rows"]:
        for target in TARGETS:
            values = row[target]
            ratio = row["ratios"].get(f"{target}/proxy", {})
            rows.append(
                [
                    f"{row['connections']} {target}",
                    report.ms(values["p50_ms"]),
                    report.ms(values["p99_ms"]),
                    f"{values['requests_per_s']:,.0f}",
                    f"{values['cpu_us']:.0f}",
                    report.times(ratio.get("p50_ms")),
                    report.times(ratio.get("p99_ms")),
                    report.times(ratio.get("requests_per_s")),
                    report.times(ratio.get("cpu_us")),
                ]
            )
    absolute = ("p50 ms", "p99 ms", "req/s", "cpu µs")
    columns = ("", *absolute, "p50 ratio", "p99 ratio", "req/s ratio", "cpu ratio")
    title = f"medians of {result['rounds']} interleaved rounds of {result['duration_s']:g} s, by connections"
    report.print_table(out, title, columns, rows)
    out.print(
        "ratio: to the proxy's, the median of the rounds' own. cpu: of the target's own process, a request; the "
        "generator's time is in every other figure.",
        style="dim",
    )
    out.print(report.machine_line(result["machine"]), style="dim", markup=False)
    for warning in result["warnings"]:
        out.print(f"warning: {warning}", style="yellow", markup=False)
