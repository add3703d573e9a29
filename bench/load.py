"""`poolbench load`: how a URL answers under load, in a closed or an open loop."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import msgspec

from bench import report
from bench.engine import Engine, OnProgress, sleep_precisely
from bench.latency import Recorder
from bench.link import UNTOLD, Outcome
from bench.target import Plan

BUSY = 0.9  # of a core: a generator that uses more may be what was measured
LATE_MS = 1.0  # an open loop's p99 lateness above this is the generator's fault
LEAD_NS = 700_000_000  # processes start together this long after they were told to


class GeneratorFailed(Exception):
    """A generator process did not deliver."""


class Counted(msgspec.Struct):
    """An Outcome as it goes between processes."""

    kinds: dict[str, dict[int, int]]
    lateness: dict[int, int]
    errors: dict[str, int]
    waited: int
    answers: int
    unfinished: int
    elapsed_s: float
    cpu_s: float


class Order(msgspec.Struct):
    """What a generator process is told on its stdin."""

    plan: Plan
    start_ns: int
    tell: bool  # show progress, if stderr is a terminal


def pack(outcome: Outcome) -> Counted:
    """For the way between processes."""
    return Counted(
        kinds={kind: recorder.counts() for kind, recorder in outcome.kinds.items()},
        lateness=outcome.lateness.counts(),
        errors=outcome.errors,
        waited=outcome.waited,
        answers=outcome.answers,
        unfinished=outcome.unfinished,
        elapsed_s=outcome.elapsed_s,
        cpu_s=outcome.cpu_s,
    )


def combine(parts: list[Counted]) -> Outcome:
    """What several generators saw together: `cpu_s` is that of the busiest, which is what may have been too little."""
    whole = Outcome()
    for part in parts:
        for kind, counts in part.kinds.items():
            whole.kinds.setdefault(kind, Recorder()).merge(counts)
        whole.lateness.merge(part.lateness)
        for kind, count in part.errors.items():
            whole.errors[kind] = whole.errors.get(kind, 0) + count
        whole.waited += part.waited
        whole.answers += part.answers
        whole.unfinished += part.unfinished
        whole.elapsed_s = max(whole.elapsed_s, part.elapsed_s)
        whole.cpu_s = max(whole.cpu_s, part.cpu_s)
    return whole


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `stop`, the second is an ordinary one. Outside the main thread it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(plan: Plan, processes: int = 1, on_progress: OnProgress | None = None) -> Outcome:
    """Carry out the plan. Ctrl-C ends it early with what there is. Raises BadTarget, GeneratorFailed.

    Of several processes the first tells the progress, of its own share, on stderr."""
    if processes <= 1:
        engine = Engine(plan, on_progress)
        sleep_precisely()
        with on_interrupt(engine.stop):
            return engine.run()
    Engine(plan).poll.close()  # what is wrong with the plan is said once, here
    processes = min(processes, plan.connections)
    start_ns = time.monotonic_ns() + LEAD_NS
    running = [
        _spawn(
            Order(msgspec.structs.replace(plan, index=i, count=processes), start_ns, i == 0 and on_progress is not None)
        )
        for i in range(processes)
    ]
    try:
        with on_interrupt(lambda: None):  # each of them gets the Ctrl-C too, and ends by itself
            return combine([_collect(process) for process in running])
    finally:
        for process in running:
            process.kill()
            process.wait()


def _spawn(order: Order) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "bench.load"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(msgspec.msgpack.encode(order))
    process.stdin.close()
    process.stdin = None
    return process


def _collect(process: subprocess.Popen[bytes]) -> Counted:
    out, _ = process.communicate()
    if process.returncode != 0:
        raise GeneratorFailed(f"a generator process ended with status {process.returncode}")
    return msgspec.msgpack.decode(out, type=Counted)


def generate() -> None:
    """A generator process: an Order on stdin, a Counted on stdout."""
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Order)
    engine = Engine(order.plan, progress_on_terminal() if order.tell else None)
    sleep_precisely()
    with on_interrupt(engine.stop):
        outcome = engine.run(order.start_ns)
    sys.stdout.buffer.write(msgspec.msgpack.encode(pack(outcome)))


# What it comes to


def warnings(plan: Plan, outcome: Outcome) -> list[str]:
    """What the reader must know before believing the figures."""
    found: list[str] = []
    busy = outcome.cpu_s / outcome.elapsed_s if outcome.elapsed_s else 0.0
    if busy > BUSY:
        found.append(
            f"the generator used {busy:.0%} of a core: it, not the target, may be what was measured; try --processes"
        )
    late = outcome.lateness.summary()["p99"]
    if late > LATE_MS:
        found.append(
            f"the generator itself sent 1 % of its requests {late:.1f} ms late or more: lower the rate, or free a core"
        )
    due = outcome.lateness.summary()["count"] + outcome.waited
    if plan.rate is not None and outcome.waited > 0.01 * max(due, 1):
        found.append(
            f"{outcome.waited} requests waited for one of the {plan.connections} connections to be free (their latency "
            "includes it): raise --connections unless that is what you want to measure"
        )
    if outcome.errors.get("connect") and not outcome.answers:
        found.append("no connection could be made: does anything listen there?")
    elif outcome.errors and not outcome.answers:
        found.append("no request was answered well: look at one answer, such as with `curl -i`")
    if outcome.unfinished:
        found.append(f"interrupted: {outcome.unfinished} requests on their way are not counted")
    return found


def as_result(plan: Plan, outcome: Outcome, processes: int) -> dict[str, Any]:
    """The JSON of one load; latencies in milliseconds."""
    every = Recorder()
    for recorder in outcome.kinds.values():
        every.merge(recorder.counts())
    told = [kind for kind in outcome.kinds if kind != UNTOLD]
    latency = {"all": every.summary()}
    if told:
        latency.update({kind: outcome.kinds[kind].summary() for kind in report.by_kind(outcome.kinds)})
    return report.result(
        "load",
        report.machine(),
        url=plan.url,
        method=plan.method,
        loop="open" if plan.rate is not None else "closed",
        rate=plan.rate,
        connections=plan.connections,
        processes=processes,
        elapsed_s=round(outcome.elapsed_s, 3),
        answers=outcome.answers,
        requests_per_s=round(outcome.answers / outcome.elapsed_s, 1) if outcome.elapsed_s else 0.0,
        latency_ms=latency,
        errors=dict(sorted(outcome.errors.items())),
        lateness_ms=outcome.lateness.summary() if plan.rate is not None else None,
        waited_for_connection=outcome.waited,
        unfinished=outcome.unfinished,
        generator_cpu=round(outcome.cpu_s / outcome.elapsed_s, 3) if outcome.elapsed_s else 0.0,
        warnings=warnings(plan, outcome),
    )


def show(result: dict[str, Any]) -> None:
    """The same, for people."""
    out = report.console()
    pace = f"{result['rate']:g} requests/s, latency from when each was due" if result["rate"] else "closed loop"
    title = f"{result['method']} {result['url']}: {pace}, {result['connections']} connections"
    rows = [
        [
            kind,
            f"{summary['count']:,}",
            *(report.ms(summary[column] if summary["count"] else None) for column in report.COLUMNS),
        ]
        for kind, summary in result["latency_ms"].items()
    ]
    if result["lateness_ms"]:
        late = result["lateness_ms"]
        rows.append(["(generator late)", f"{late['count']:,}", *(report.ms(late[column]) for column in report.COLUMNS)])
    report.print_table(out, title, ("start kind, ms", "answers", *report.COLUMNS), rows)
    out.print(
        f"{result['answers']:,} answers in {result['elapsed_s']:.2f} s: {result['requests_per_s']:,.0f} requests/s",
        markup=False,
    )
    if result["errors"]:
        out.print("errors: " + ", ".join(f"{kind} {count:,}" for kind, count in result["errors"].items()), markup=False)
    out.print(report.machine_line(result["machine"]), style="dim", markup=False)
    for warning in result["warnings"]:
        out.print(f"warning: {warning}", style="yellow", markup=False)


def progress_line(outcome: Outcome) -> str:
    """One line while it runs."""
    rate = outcome.answers / outcome.elapsed_s if outcome.elapsed_s else 0.0
    errors = sum(outcome.errors.values())
    return f"{outcome.elapsed_s:6.1f} s  {outcome.answers:,} answers  {rate:,.0f}/s  {errors:,} errors"


def progress_on_terminal() -> OnProgress | None:
    """Shows progress on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        return None

    def tell(outcome: Outcome) -> None:
        sys.stderr.write(f"\r{progress_line(outcome)}\x1b[K")
        sys.stderr.flush()

    return tell


if __name__ == "__main__":
    generate()
