"""poolctl top: a live view of functions and instances."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from gateway.ctl_common import (
    Column,
    Session,
    age,
    console,
    count,
    megabytes,
    print_json,
    print_table,
    session_command,
    table_lines,
)

if TYPE_CHECKING:
    from rich.console import Group

    from gateway.client import Client

COLUMNS = (
    Column("NAME", flexible=True),
    Column("STATE", state=True),
    Column("CALLS/s", right=True),
    Column("RUN", right=True),
    Column("QUEUE", right=True),
    Column("IDLE", right=True),
    Column("FROZEN", right=True),
    Column("START", right=True),
    Column("COLD %", right=True),
    Column("ERRORS", right=True),
)


class Sample:
    """The daemon's state at one moment, and what happened since the one before."""

    def __init__(self, status: dict[str, Any], functions: list[dict[str, Any]], before: Sample | None) -> None:
        self.at_s = time.monotonic()
        self.status = status
        self.functions = functions
        self.calls: dict[str, int] = {row["name"]: sum(row["totals"].values()) for row in functions}
        self._rates: dict[str, float] = {}
        if before is not None:
            for name, calls in self.calls.items():
                if calls >= before.calls.get(name, calls + 1):
                    self._rates[name] = (calls - before.calls[name]) / max(self.at_s - before.at_s, 0.001)

    def rate(self, name: str) -> float | None:
        """Invocations a second since the sample before; None without one, or after a restart."""
        return self._rates.get(name)

    def rows(self) -> list[list[str]]:
        """Cells for COLUMNS, the busiest function first."""
        ordered = sorted(self.functions, key=lambda row: (-(self.rate(row["name"]) or 0), -row["running"], row["name"]))
        return [self._row(row) for row in ordered]

    def _row(self, row: dict[str, Any]) -> list[str]:
        rate = self.rate(row["name"])
        calls = self.calls[row["name"]]
        instances = row["instances"]
        return [
            row["name"],
            row["state"],
            "-" if rate is None else (f"{rate:.1f}" if rate < 100 else count(round(rate))),
            str(row["running"]),
            str(row["queued"]),
            str(instances["idle"]),
            str(instances["frozen"]),
            str(instances["starting"]),
            f"{100 * row['totals']['cold'] / calls:.1f}" if calls else "-",
            count(row["errors"]),
        ]

    def heading(self) -> list[str]:
        """Two lines about the host."""
        now = self.status
        memory = now["memory"]
        total = (
            f"{sum(self._rates.values()):.1f} calls/s" if self._rates else f"{count(sum(self.calls.values()))} calls"
        )
        state = "draining" if now["draining"] else "up"
        return [
            f"poold {now['version']} on {now['backend']}, {state} {age(now['uptime_s'])}: {total}, "
            f"{now['running']} running, {now['queued']} queued",
            f"memory {megabytes(memory['charged_mb'])} of {megabytes(memory['limit_mb'])} charged, "
            f"{sum(now['instances'].values())} instances, {now['starts_in_flight']} starting, "
            f"{len(now['breakers'])} failing",
        ]


def take(client: Client, before: Sample | None) -> Sample:
    """Ask the daemon for its present state."""
    status = client.call("GET", "/v1/status")
    return Sample(status, client.call("GET", "/v1/functions")["functions"], before)


@click.command(
    epilog="""\b
CALLS/s since the last look, RUN invocations running, COLD % of all calls that
had to wait for a start. Ctrl-C ends it.
\b
Examples:
  poolctl top
  poolctl top --once              one look, for scripts
"""
)
@click.option("--once", is_flag=True, help="Look once, print, end.")
@click.option(
    "-i",
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between looks.",
)
@session_command
def top(session: Session, once: bool, interval_s: float) -> None:
    """Watch functions and their pools at work."""
    client = session.client
    sample = take(client, None)
    if session.json:
        print_json({"status": sample.status, "functions": sample.functions})
    elif once or not sys.stdout.isatty():
        for line in [*sample.heading(), ""]:
            click.echo(line)
        print_table(COLUMNS, sample.rows())
    else:
        _watch(client, sample, interval_s)


def _watch(client: Client, sample: Sample, interval_s: float) -> None:
    from rich.live import Live

    out = console()
    with Live(_view(sample, out.width, out.height), console=out, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                sample = take(client, sample)
                live.update(_view(sample, out.width, out.height), refresh=True)
        except KeyboardInterrupt:
            return  # the way to leave it


def _view(sample: Sample, width: int, height: int) -> Group:
    from rich.console import Group
    from rich.text import Text

    first, second = sample.heading()
    rows = sample.rows()
    room = max(height - 5, 1)  # heading, blank, titles, the line that says what is left out
    hidden = len(rows) - room
    table = "\n".join(table_lines(COLUMNS, rows[:room], width))
    parts = [Text(first, style="bold"), Text(second, style="dim"), Text(), Text.from_ansi(table, no_wrap=True)]
    if hidden > 0:
        parts.append(Text(f"... and {hidden} more", style="dim"))
    return Group(*parts)
