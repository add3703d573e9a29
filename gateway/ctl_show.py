"""poolctl ls, ps, inspect, status, version: looking at what is there."""

from __future__ import annotations

from typing import Any

import click

from gateway.ctl_common import (
    Column,
    Session,
    age,
    count,
    duration,
    megabytes,
    name_argument,
    print_json,
    print_pairs,
    print_table,
    session_command,
)
from gateway.version import VERSION

FUNCTION_COLUMNS = (
    Column("NAME", flexible=True),
    Column("STATE", state=True),
    Column("IDLE", right=True),
    Column("FROZEN", right=True),
    Column("BUSY", right=True),
    Column("RANGE", right=True),
    Column("QUEUE", right=True),
    Column("CALLS", right=True),
    Column("COLD", right=True),
    Column("ERRORS", right=True),
)
INSTANCE_COLUMNS = (
    Column("INSTANCE"),
    Column("FUNCTION", flexible=True),
    Column("STATE", state=True),
    Column("USED", right=True),
    Column("USES", right=True),
    Column("AGE", right=True),
    Column("IDLE", right=True),
    Column("MEMORY", right=True),
    Column("PID", right=True),
)


def function_row(row: dict[str, Any]) -> list[str]:
    """One function's cells for FUNCTION_COLUMNS."""
    instances = row["instances"]
    return [
        row["name"],
        row["state"],
        str(instances["idle"]),
        str(instances["frozen"]),
        str(instances["busy"]),
        f"{row['min']}-{row['max']}",
        str(row["queued"]),
        count(sum(row["totals"].values())),
        count(row["totals"]["cold"]),
        count(row["errors"]),
    ]


def instance_row(row: dict[str, Any]) -> list[str]:
    """One instance's cells for INSTANCE_COLUMNS."""
    return [
        row["id"],
        row["function"],
        row["state"],
        f"{row['used']}/{row['slots']}",
        count(row["uses"]),
        age(row["age_s"]),
        age(row["idle_s"]),
        megabytes(row["memory_mb"]),
        str(row["pid"] or "-"),
    ]


@click.command(
    epilog="""\b
Instances by state; RANGE how many there may be. Since the daemon started:
CALLS invocations, COLD of them waited for a start, ERRORS did not end well.
\b
Examples:
  poolctl ls
  poolctl ls -q | xargs poolctl rm
"""
)
@click.option("-q", "--quiet", is_flag=True, help="Only the names.")
@session_command
def ls(session: Session, quiet: bool) -> None:
    """List the deployed functions and their pools."""
    answer = session.client.call("GET", "/v1/functions")
    rows = answer["functions"]
    if session.json:
        print_json(answer)
    elif quiet:
        for row in rows:
            click.echo(row["name"])
    elif rows:
        print_table(FUNCTION_COLUMNS, [function_row(row) for row in rows])
    else:
        click.echo("no functions yet: `poolctl deploy DIRECTORY` brings the first", err=True)


@click.command(
    epilog="""\b
USED is slots in use of slots, USES how many invocations it has served.
\b
Examples:
  poolctl ps
  poolctl ps hello
"""
)
@click.argument("name", required=False)
@session_command
def ps(session: Session, name: str | None) -> None:
    """List the running instances, of one function or of all."""
    if name is None:
        rows = session.client.call("GET", "/v1/instances")["instances"]
    else:
        from gateway.client import function_path

        rows = session.client.call("GET", function_path(name))["instance_list"]
    if session.json:
        print_json({"instances": rows})
    elif rows:
        print_table(INSTANCE_COLUMNS, [instance_row(row) for row in rows])
    else:
        click.echo("no instances", err=True)


@click.command(
    epilog="""\b
Examples:
  poolctl inspect hello
  poolctl inspect hello --json | jq .spec
"""
)
@name_argument
@session_command
def inspect(session: Session, name: str) -> None:
    """Show everything about one function."""
    from gateway.client import function_path

    info = session.client.call("GET", function_path(name))
    if session.json:
        print_json(info)
        return
    instances = info["instances"]
    breaker = info["breaker"]
    print_pairs(
        [
            ("Function", info["name"]),
            ("Description", info["description"]),
            ("State", info["state"]),
            ("Problem", info["problem"] or ""),
            ("Runs", info["runs"]),
            ("Contract", info["contract"]),
            ("Revision", info["revision"]),
            ("Digest", info["digest"]),
            ("Deployed", info["deployed_at"]),
            ("Pool", f"{_counted(instances)}; {info['min']} to {info['max']} allowed"),
            ("Invocations", f"{_counted(info['totals'])}; {info['running']} running, {info['queued']} queued"),
            ("Errors", str(info["errors"])),
            ("Refused", _counted(info["rejected_by_reason"]) if info["rejected"] else "0"),
            ("Expected", _expected(info["estimates"])),
            ("Breaker", _breaker(breaker)),
            ("Spec", _spec_text(info["spec"])),
        ]
    )
    if info["instance_list"]:
        click.echo()
        print_table(INSTANCE_COLUMNS, [instance_row(row) for row in info["instance_list"]])


def _counted(numbers: dict[str, int]) -> str:
    shown = [f"{value} {key}" for key, value in numbers.items() if value]
    return ", ".join(shown) or "none"


def _expected(estimates: dict[str, float | None]) -> str:
    known = [
        f"{key.removesuffix('_s').replace('_', ' ')} {duration(value)}"
        for key, value in estimates.items()
        if value is not None
    ]
    return ", ".join(known)


def _breaker(breaker: dict[str, Any]) -> str:
    if not breaker.get("open"):
        return f"closed, {breaker['failures']} failures in a row" if breaker.get("failures") else ""
    text = f"open after {breaker.get('failures', 0)} failures, next start in {duration(breaker.get('retry_after_s'))}"
    return f"{text}\n{breaker['detail']}" if breaker.get("detail") else text


def _spec_text(spec: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(spec, sort_keys=False, default_flow_style=False, allow_unicode=True)).rstrip()


@click.command(
    epilog="""\b
Examples:
  poolctl status
  poolctl status --json | jq .memory
"""
)
@session_command
def status(session: Session) -> None:
    """Show the daemon's backend, limits, memory and warnings."""
    now = session.client.call("GET", "/v1/status")
    if session.json:
        print_json(now)
        return
    engine = "\n".join(f"{key}: {value}" for key, value in now["engine"].items() if value != now["isolation"])
    memory = now["memory"]
    print_pairs(
        [
            ("poold", f"{now['version']}, pid {now['pid']}, up {age(now['uptime_s'])}"),
            ("State", "draining: new invocations are refused" if now["draining"] else "serving"),
            ("Backend", f"{now['backend']} ({now['backend_reason']})"),
            ("Engine", engine),
            ("Listening", "\n".join(now["listen"])),
            ("Isolation", now["isolation"]),
            ("Functions", str(now["functions"])),
            ("Instances", _counted(now["instances"])),
            ("Memory", f"{memory['charged_mb']} of {memory['limit_mb']} MB charged"),
            ("Running", f"{now['running']} of {now['max_concurrency']} invocations, {now['queued']} queued"),
            ("Starts", f"{now['starts_in_flight']} of {now['max_starts']} in flight"),
            ("Invocations", _counted(now["totals"])),
            ("Errors", f"{now['errors']}, {now['rejected']} refused"),
        ]
    )
    if now["engine_problem"]:
        click.echo(f"\n{click.style('the engine does not answer:', fg='red', bold=True)} {now['engine_problem']}")
    for breaker in now["breakers"]:
        wait = duration(breaker["retry_after_s"])
        click.echo(f"\n{click.style('failing:', fg='red', bold=True)} {breaker['function']}, next start in {wait}")
        if breaker["detail"]:
            click.echo(f"  {breaker['detail']}")
        click.echo(f"  `poolctl logs {breaker['function']}` shows why; `poolctl reset {breaker['function']}` tries now")
    for warning in now["warnings"]:
        click.echo(f"\n{click.style('warning:', fg='yellow', bold=True)} {warning}")


@click.command(
    epilog="""\b
Example:
  poolctl version
"""
)
@session_command
def version(session: Session) -> None:
    """Show the versions of poolctl and poold."""
    from gateway.client import Client
    from gateway.client_errors import ClientError

    try:
        daemon = Client(session.host, timeout_s=2).call("GET", "/v1/status")["version"]
    except ClientError:
        daemon = None
    if session.json:
        print_json({"poolctl": VERSION, "poold": daemon})
    else:
        click.echo(f"poolctl {VERSION}")
        click.echo(f"poold   {daemon or 'does not answer at ' + session.host}")
