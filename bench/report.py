"""What every result carries and how it is shown: the facts of the machine, tables, JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table

SCHEMA = 1  # of every JSON result; changes when a field changes its meaning or goes
WIDEST = 1000  # of a table, in characters
COLUMNS = ("min", "p50", "p90", "p99", "p99.9", "max")
KINDS = ("warm", "thawed", "prewarmed", "cold")  # the order of start kinds in tables


def machine(**more: str) -> dict[str, Any]:
    """The facts without which a figure cannot be read. `more`: backend, engine and the like."""
    facts: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    facts.update({name: value for name, value in more.items() if value})
    return facts


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def result(command: str, machine_facts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A JSON result: {"poolbench": command, "schema": SCHEMA, "machine": {...}, ...fields}."""
    return {"poolbench": command, "schema": SCHEMA, "machine": machine_facts, **fields}


def print_json(data: dict[str, Any]) -> None:
    """On stdout, for programs."""
    click.echo(json.dumps(data, indent=2))


def console() -> Console:
    """Where tables go: stdout, as wide as it is (100 columns when it is no terminal)."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=max(120, out.width))


def machine_line(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    names = {"cores": "{} cores", "kernel": "kernel {}", "python": "Python {}", "load_average": "load {}"}
    return ", ".join(names.get(name, name + " {}").format(value) for name, value in facts.items() if name != "cpu")


def ms(value: float | None) -> str:
    """Milliseconds with as many digits as say something."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def times(value: float | None) -> str:
    """A ratio."""
    if value is None:
        return "-"
    return f"{value:.0f}x" if value >= 100 else f"{value:.2f}x"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column to the left, numbers to the right."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def print_table(out: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print it whole: without lines where it would be wider than the terminal. A figure cut short is none."""
    shown = table(title, columns, rows)
    terminal = out.width
    unbounded = out.options.update(max_width=WIDEST)
    if out.measure(shown, options=unbounded).maximum > terminal:
        shown.box, shown.padding, shown.pad_edge = None, (0, 1, 0, 0), False
    out.width = max(terminal, out.measure(shown, options=unbounded).maximum)  # what is still too wide, it wraps itself
    out.print(shown, markup=False)
    out.width = terminal


def by_kind(names: Iterable[str]) -> list[str]:
    """Start kinds in their usual order, others after them."""
    found = set(names)
    return [kind for kind in KINDS if kind in found] + sorted(found.difference(KINDS))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of a few samples (an HdrHistogram is for many). Raises ValueError for none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, min(len(ordered), int(rank)) - 1)]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float | None:
    """The median over rounds of above / below: what drifts during a run drifts in both."""
    ratios = [one / other for one, other in zip(above, below, strict=True) if other]
    return statistics.median(ratios) if ratios else None
