"""poolctl logs: what instances print."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import click

from gateway.ctl_common import Session, name_argument, session_command

COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


@click.command(
    epilog="""\b
Examples:
  poolctl logs hello
  poolctl logs -f --tail 0 hello        only what comes from now on
  poolctl logs --invocation ID hello    what one invocation printed
"""
)
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(0, 100_000),
    default=100,
    show_default="100",
    metavar="LINES",
    help="Begin so many lines back.",
)
@click.option("--invocation", metavar="ID", help="Only what this invocation printed.")
@click.option("--instance", metavar="ID", help="Only what this instance printed.")
@click.option("-t", "--timestamps", is_flag=True, help="Show when (UTC) and by which invocation.")
@session_command
def logs(
    session: Session,
    name: str,
    follow: bool,
    tail: int,
    invocation: str | None,
    instance: str | None,
    timestamps: bool,
) -> None:
    """Show what a function's instances printed.

    With --json a line is one JSON object.
    """
    from gateway.client import function_path

    query: dict[str, str] = {"tail": str(tail)}
    if follow:
        query["follow"] = "true"
    if invocation:
        query["invocation"] = invocation
    if instance:
        query["instance"] = instance
    with session.client.stream("GET", f"{function_path(name, 'logs')}?{urlencode(query)}") as answer:
        for entry in answer.lines():
            if session.json:
                click.echo(json.dumps(entry, ensure_ascii=False))
            else:
                _show(entry, timestamps)


def _show(entry: dict[str, Any], timestamps: bool) -> None:
    if entry.get("dropped"):
        click.echo(click.style(f"[{entry['dropped']} lines were lost here: they came too fast]", dim=True), err=True)
    instance = str(entry["instance"])
    prefix = click.style(f"{instance} |", fg=COLOURS[sum(instance.encode()) % len(COLOURS)])
    if timestamps:
        at = click.style(str(entry["at"]), dim=True)
        prefix = f"{at} {prefix} {click.style(entry['invocation'] or '-', dim=True)}"
    text = str(entry["text"])
    click.echo(f"{prefix} {click.style(text, fg='red') if entry['stream'] == 'stderr' else text}")
