"""`poolbench rest`: what the daemon costs while nothing happens, with functions deployed and instances frozen."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench import report, workload
from bench.daemon import DaemonFailed, Poold, poold_to_measure
from pool.spec import PoolSpec

MIB = 1_048_576
START_TIMEOUT_S = 600.0
SETTLE_S = 2.0  # what a deployment leaves to do is not rest


def usage(process: psutil.Process) -> dict[str, Any]:
    """{"pid", "name", "rss_mb", "pss_mb", "cpu_s"} of one process; PSS null where it may not be read."""
    with process.oneshot():
        times = process.cpu_times()
        shown: dict[str, Any] = {"pid": process.pid, "name": process.name(), "cpu_s": times.user + times.system}
        shown["rss_mb"] = round(process.memory_info().rss / MIB, 1)
        try:
            shown["pss_mb"] = round(process.memory_full_info().pss / MIB, 1)
        except psutil.AccessDenied:
            shown["pss_mb"] = None
    return shown


def children_of(process: psutil.Process) -> dict[int, dict[str, Any]]:
    """Its children and theirs, by pid; what ends meanwhile is left out."""
    found: dict[int, dict[str, Any]] = {}
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[child.pid] = usage(child)
    return found


def fill(poold: Poold, directory: Path, functions: int, frozen: int, tell: Callable[[str], None]) -> None:
    """Deploy so many functions with so many frozen instances in all. Raises DaemonFailed, ClientError."""
    work = workload.builtin(directory)
    for number in range(functions):
        floor = frozen // functions + (1 if number < frozen % functions else 0)
        tell(f"deploying function {number + 1} of {functions}")
        poold.deploy(work.variant(f"rest-{number}", PoolSpec(min=floor, freeze_after_s=0.0)), work.code)
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        seen = int(poold.status()["instances"]["frozen"])
        tell(f"{seen} of {frozen} instances frozen")
        if seen >= frozen:
            return
        if time.monotonic() > deadline_s:
            raise DaemonFailed(f"only {seen} of {frozen} instances were frozen after {START_TIMEOUT_S:g} s")
        time.sleep(0.1)


def run(
    host: str | None, backend: str, functions: int, frozen: int, seconds: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The measurement. Raises DaemonFailed, ClientError."""
    with tempfile.TemporaryDirectory(prefix="poolbench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o711)
        poold = stack.enter_context(poold_to_measure(host, backend))
        fill(poold, directory, functions, frozen, tell)
        status = poold.status()
        facts = report.machine(**poold.facts())
        process = poold.process()
        time.sleep(SETTLE_S)
        try:
            return as_result(facts, status, *watch(process, seconds, tell))
        except psutil.NoSuchProcess:
            raise DaemonFailed("the daemon ended while it was watched") from None


def watch(
    process: psutil.Process, seconds: float, tell: Callable[[str], None]
) -> tuple[float, dict[str, Any], list[dict[str, Any]]]:
    """Seconds watched, the process' usage and its children's; `cpu_s` is what was used meanwhile."""
    began_s = time.monotonic()
    before, children_before = usage(process), children_of(process)
    while (rest_s := began_s + seconds - time.monotonic()) > 0:
        tell(f"watching the daemon at rest, {rest_s:.0f} s more")
        time.sleep(min(1.0, rest_s))
    after, children = usage(process), children_of(process)
    watched_s = time.monotonic() - began_s
    after["cpu_s"] -= before["cpu_s"]
    for pid, child in children.items():
        child["cpu_s"] -= children_before[pid]["cpu_s"] if pid in children_before else 0.0
    return watched_s, after, list(children.values())


def as_result(
    facts: dict[str, Any],
    status: dict[str, Any],
    watched_s: float,
    daemon: dict[str, Any],
    children: list[dict[str, Any]],
) -> dict[str, Any]:
    """The JSON; CPU in percent of one core. Children with the same name are summed up."""
    names: dict[str, dict[str, Any]] = {}
    for child in children:
        entry = names.setdefault(child["name"], {"name": child["name"], "count": 0, "cpu_percent": 0.0, "rss_mb": 0.0})
        entry["count"] += 1
        entry["cpu_percent"] = round(entry["cpu_percent"] + 100 * child["cpu_s"] / watched_s, 3)
        entry["rss_mb"] = round(entry["rss_mb"] + child["rss_mb"], 1)
    return report.result(
        "rest",
        facts,
        functions=status["functions"],
        instances=status["instances"],
        seconds=round(watched_s, 1),
        daemon={
            "pid": daemon["pid"],
            "cpu_percent": round(100 * daemon["cpu_s"] / watched_s, 3),
            "rss_mb": daemon["rss_mb"],
            "pss_mb": daemon["pss_mb"],
        },
        children=sorted(names.values(), key=lambda entry: -float(entry["rss_mb"])),
    )


def show(result: dict[str, Any]) -> None:
    """For people."""
    out = report.console()
    daemon = result["daemon"]
    pss = "-" if daemon["pss_mb"] is None else f"{daemon['pss_mb']:.1f}"
    rows = [["poold itself", "1", f"{daemon['cpu_percent']:.2f} %", f"{daemon['rss_mb']:.1f}", pss]]
    for child in result["children"]:
        shown = [f"child: {child['name']}", str(child["count"])]
        rows.append([*shown, f"{child['cpu_percent']:.2f} %", f"{child['rss_mb']:.1f}", "-"])
    frozen = result["instances"]["frozen"]
    title = f"at rest for {result['seconds']:g} s: {result['functions']} functions, {frozen} frozen instances"
    columns = ("process", "count", "CPU of one core", "RSS MB", "PSS MB")
    report.print_table(out, title, columns, rows)
    out.print(
        "children on the process backend are the instances themselves; their RSS counts shared pages", style="dim"
    )
    out.print(report.machine_line(result["machine"]), style="dim", markup=False)
