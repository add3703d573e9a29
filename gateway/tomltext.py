"""A TOML text as a tree that knows its lines, which tomllib alone does not tell."""

from __future__ import annotations

import re
import tomllib

from gateway.shape import Node, Problem, Scalar
from gateway.textual import TextError

_HEADER = re.compile(r"^\s*\[{1,2}\s*([^\[\]#]+?)\s*\]{1,2}")
_KEY = re.compile(r"^\s*((?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'))*)\s*=")
_PART = re.compile(r"[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*'")
_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")

Place = tuple[int, int]


def read_toml(text: str, source: str) -> Node:
    """The document as a tree. Raises TextError."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        message = str(exc)
        match = _AT.search(message)
        end = text.count("\n") + 1  # tomllib's "end of document"
        line, column = (int(match[1] or end), int(match[2] or 0)) if match else (0, 0)
        reason = _AT.sub("", message)
        hint = "a text needs quotes" if reason == "Invalid value" else ""
        problem = Problem(source, line, column, "", f"not readable as TOML: {reason[:1].lower()}{reason[1:]}", hint)
        raise TextError([problem]) from None
    except RecursionError:
        raise TextError([Problem(source, 0, 0, "", "nested too deeply")]) from None
    return _node(data, (), _places(text), (1, 1))


def _places(text: str) -> dict[tuple[str, ...], Place]:
    """Where each key stands. A line inside a multi-line text may look like a key; the first place counts."""
    places: dict[tuple[str, ...], Place] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header and not key:
            table = _parts(header[1])
            path, column = table, header.start(1) + 1
        elif key:
            path, column = table + _parts(key[1]), key.start(1) + 1
        else:
            continue
        for length in range(1, len(path) + 1):
            places.setdefault(path[:length], (number, column))
    return places


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(text))


def _node(value: object, path: tuple[str, ...], places: dict[tuple[str, ...], Place], inherited: Place) -> Node:
    place = places.get(path, inherited)
    if isinstance(value, dict):
        children = {key: _node(child, (*path, key), places, place) for key, child in value.items()}
        keys = {key: places.get((*path, key), place) for key in value}
        return Node(dict(children), *place, keys=keys)
    if isinstance(value, list):
        return Node([_node(child, path, places, place) for child in value], *place)
    if isinstance(value, bool):
        return Node(value, *place, text=str(value).lower())
    plain: Scalar = value if isinstance(value, int | float | str) else str(value)  # dates and times become texts
    return Node(plain, *place, text=str(value), plain=not isinstance(value, str))
