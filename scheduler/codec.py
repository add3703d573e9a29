"""A journal's window as bytes and back: plain JSON, so that loading one can do nothing but make data."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_args, get_type_hints

from scheduler.errors import JournalError
from scheduler.messages import Deployed, Event
from scheduler.model import HostLimits, RevisionSpec
from scheduler.recording import Entry, Window
from scheduler.snapshot import RevisionState, State

FORMAT = "poold-journal"
VERSION = 1

_EVENTS: dict[str, type[Any]] = {event.__name__: event for event in get_args(Event)}
_HINTS: dict[type[Any], dict[str, Any]] = {}  # by record, as they are first needed

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Recording:
    """What a dump holds."""

    limits: HostLimits
    epoch: str
    state: State
    entries: list[Entry]
    draws: list[float]


def encode(window: Window, limits: HostLimits, epoch: str) -> bytes:
    """Reads only what nobody changes: may run in a thread while the core goes on."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "limits": _values(limits),
        "epoch": epoch,
        "state": _encode_state(window.state),
        "entries": [[now, type(event).__name__, _encode_event(event)] for now, event in window.entries],
        "draws": window.draws,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode(data: bytes) -> Recording:
    """Raises JournalError when `data` is no dump of this version."""
    try:
        document = json.loads(data)
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise JournalError(
                f"this is {document['format']!r} version {document['version']!r}, "
                f"wanted is {FORMAT!r} version {VERSION}"
            )
        return Recording(
            limits=_made(HostLimits, document["limits"]),
            epoch=str(document["epoch"]),
            state=_decode_state(document["state"]),
            entries=[_decode_entry(entry) for entry in document["entries"]],
            draws=[float(value) for value in document["draws"]],
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, JournalError):
            raise
        raise JournalError(f"this is no journal: {type(error).__name__}: {error}") from error


def _values(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _encode_event(event: Event) -> list[Any]:
    if isinstance(event, Deployed):
        return [_values(event.spec)]
    return list(_values(event).values())


def _decode_entry(entry: list[Any]) -> Entry:
    now, name, values = entry
    if name == Deployed.__name__:
        return float(now), Deployed(_made(RevisionSpec, values[0]))
    event = _EVENTS[name]
    names = [field.name for field in fields(event)]
    return float(now), _made(event, dict(zip(names, values, strict=True)))


def _made(kind: type[_Made], values: dict[str, Any]) -> _Made:
    """One of our records, each field of the type that it declares."""
    hints = _HINTS.get(kind) or _HINTS.setdefault(kind, get_type_hints(kind))
    for name, value in values.items():
        hint = hints[name]
        if hint == dict[str, int]:
            fits = all(isinstance(each, int) for each in value.values())
        else:
            fits = isinstance(value, hint) or (type(value) is int and isinstance(0.0, hint))
        if not fits:
            raise JournalError(f"{kind.__name__}: {name} cannot be {value!r}")
    return kind(**values)


def _encode_state(state: State) -> dict[str, Any]:
    document = _values(state)
    document["revisions"] = [{**_values(each), "spec": _values(each.spec)} for each in state.revisions]
    return document


def _decode_state(document: dict[str, Any]) -> State:
    revisions = tuple(
        RevisionState(
            spec=_made(RevisionSpec, each.pop("spec")), **{name: _frozen(value) for name, value in each.items()}
        )
        for each in document.pop("revisions")
    )
    return State(revisions=revisions, **{name: _frozen(value) for name, value in document.items()})


def _frozen(value: Any) -> Any:
    """Lists, as JSON has them, to the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
