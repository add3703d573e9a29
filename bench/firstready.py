"""`poolbench deploy`: from a deployment to its first ready instance, beside a plain start of the same function."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import report, start
from bench.daemon import Poold, poold_to_measure
from bench.plain import Plain, plain_start
from bench.workload import Workload
from pool.spec import PoolSpec


def deploy_ms(poold: Poold, work: Workload, number: int) -> float:
    """One deployment under a new name, until its one instance is ready; it is removed again."""
    spec = work.variant(f"deploy-{number}", PoolSpec(min=1, max=1, freeze_after_s=None))
    if work.code is not None:
        poold.upload(work.code)  # what is sent over the network is not the start's
    began_s = time.perf_counter()
    poold.deploy(spec, work.code)
    took_ms = (time.perf_counter() - began_s) * 1000
    poold.wait(spec.name, lambda instances: [one["state"] for one in instances] == ["idle"])
    poold.remove(spec.name)
    return took_ms


def measure(
    poold: Poold, plain: Plain, work: Workload, samples: int, tell: Callable[[str], None]
) -> tuple[list[float], list[float]]:
    """Milliseconds of deployments and of plain starts, in turns."""
    deployed: list[float] = []
    started: list[float] = []
    for number in range(samples):
        tell(f"round {number + 1} of {samples}")
        for turn in (0, 1):
            if (number + turn) % 2:
                deployed.append(deploy_ms(poold, work, number))
            else:
                started.append(plain.sample())
            _at_rest(poold)
    return deployed, started


def _at_rest(poold: Poold) -> None:
    """Until nothing starts or stops: what was removed must not be taken down during the next sample."""
    while (seen := poold.status()["instances"])["starting"] or seen["stopping"]:
        time.sleep(0.01)


def run(
    work_of: Callable[[Path], Workload], host: str | None, backend: str, samples: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The measurement. Raises PlainFailed, BadWorkload, DaemonFailed, ClientError."""
    with tempfile.TemporaryDirectory(prefix="poolbench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o711)
        work = work_of(directory)
        poold = stack.enter_context(poold_to_measure(host, backend))
        facts = poold.facts()
        model = work.variant("model", PoolSpec(min=1, max=1, freeze_after_s=None))
        tell(f"deploying {model.name}")
        poold.deploy(model, work.code)
        (instance,) = poold.wait(model.name, lambda instances: [one["state"] for one in instances] == ["idle"])
        plain = stack.enter_context(plain_start(work, facts["backend"], instance["id"]))
        deployed, started = measure(poold, plain, work, samples, tell)
        return report.result(
            "deploy",
            report.machine(**facts),
            function=work.spec.name,
            samples=samples,
            deploy_ms=start.summary(deployed),
            plain={"is": plain.describe(), "latency_ms": start.summary(started)},
            deploy_to_plain=round(report.median_ratio(deployed, started) or 0.0, 3),
        )


def show(result: dict[str, Any]) -> None:
    """For people."""
    out = report.console()
    columns = ("min", "p50", "p90", "p99", "max")
    rows = [
        [name, *(report.ms(values[column]) for column in columns)]
        for name, values in (
            ("deploy to first ready instance", result["deploy_ms"]),
            (start.PLAIN, result["plain"]["latency_ms"]),
        )
    ]
    title = f"{result['function']}, ms; {result['samples']} samples each, in turns"
    report.print_table(out, title, ("", *columns), rows)
    out.print(f"deploy / plain start: {report.times(result['deploy_to_plain'])} (median of the rounds)", markup=False)
    out.print(f"plain start: {result['plain']['is']}", style="dim", markup=False)
    out.print(report.machine_line(result["machine"]), style="dim", markup=False)
