"""poolctl journal: save the scheduler's journal, and show what it decided, event by event."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator
from typing import Any

import click

from gateway.client_errors import ClientError
from gateway.ctl_common import Session, print_json, session_command


@click.command(
    epilog="""\b
Examples:
  poolctl journal incident.journal
  poolctl journal --show incident.journal | less
"""
)
@click.option("--show", is_flag=True, help="Read FILE, and print each event with what was decided then.")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@session_command
def journal(session: Session, file: str, show: bool) -> None:
    """Save the scheduler's journal of events in FILE, or show a saved one.

    Replaying it shows every decision again; poold is not needed for that. FILE may be - for standard output (with
    --show: input).
    """
    if show:
        with click.open_file(file, "rb") as source:
            data = source.read()
        for line in _shown(data, as_json=session.json):
            click.echo(line)
        return
    size = 0
    with session.client.request("GET", "/v1/journal") as answer:
        if answer.status >= 400:
            raise answer.failure()
        with click.open_file(file, "wb") as target:
            for chunk in answer.chunks():
                target.write(chunk)
                size += len(chunk)
    if session.json:
        print_json({"file": file, "bytes": size})
    else:
        click.echo(f"{size} bytes of journal written to {file}", err=True)


def _shown(data: bytes, *, as_json: bool) -> Iterator[str]:
    """Lines: the seconds since the first event, the event, and below it each action. Raises ClientError."""
    from scheduler.errors import JournalError
    from scheduler.journal import Replay

    try:
        run = Replay(data)
        first_s: float | None = None
        while (step := run.step()) is not None:
            now_s, event, actions = step
            first_s = now_s if first_s is None else first_s
            if as_json:
                yield json.dumps(
                    {"at_s": round(now_s - first_s, 6), "event": _fields(event), "actions": [*map(_fields, actions)]}
                )
                continue
            yield f"{now_s - first_s:12.6f}  {_words(event, now_s)}"
            yield from (f"{'':14}-> {_words(action, now_s)}" for action in actions)
    except JournalError as exc:
        raise ClientError(str(exc), hint="`poolctl journal FILE` saves one") from exc


def _fields(record: Any) -> dict[str, Any]:
    return {"is": type(record).__name__, **dataclasses.asdict(record)}


def _words(record: Any, now_s: float) -> str:
    """Its name, and the fields that are not as they always are. A deadline as what is left until it."""
    words = [type(record).__name__]
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            words.append(_words(value, now_s).partition(" ")[2])
        elif field.name == "deadline":
            words.append(f"deadline=+{value - now_s:g}s")
        elif isinstance(value, enum.Enum):
            words.append(f"{field.name}={value.value}")
        else:
            words.append(f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}")
    return " ".join(words)
