"""What a person wrote, checked against the struct it should become: every fault at once, each with its line.

msgspec's own conversion stops at the first fault and knows no lines, so a small tree that keeps the positions is
walked beside the struct's description. Specs (YAML, JSON) and the configuration (TOML) share it.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
from msgspec import inspect as mi

Path = tuple[str | int, ...]
Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `line` and `column` count from 1; 0 is unknown. `path` is such as `pool.max`."""

    source: str
    line: int
    column: int
    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}" if self.line else self.source
        path = f"{self.path}: " if self.path else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{where}: {path}{self.message}{hint}"


@dataclass(slots=True)
class Node:
    """A value with its place. `value` of a mapping is {key: Node}, of a sequence a list of Nodes.

    `text` is a scalar as it was written; `plain` False: it was quoted. `keys` gives the place of each key.
    """

    value: Scalar | dict[str, Node] | list[Node]
    line: int = 0
    column: int = 0
    text: str = ""
    plain: bool = True
    keys: dict[str, tuple[int, int]] = field(default_factory=dict)


def written(path: Path) -> str:
    """A path as users write it: pool.max, mounts[0].source."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else part)
    return text


def place(root: Node, path: Path) -> tuple[int, int]:
    """Line and column of what stands at `path`, or of the deepest part of it that exists."""
    node, found = root, (root.line, root.column)
    for part in path:
        children = node.value
        if isinstance(children, dict) and isinstance(part, str) and part in children:
            node, found = children[part], node.keys.get(part, (children[part].line, children[part].column))
        elif isinstance(children, list) and isinstance(part, int) and part < len(children):
            node = children[part]
            found = (node.line, node.column)
        else:
            return found
    # A scalar is where it stands; a block is where its key stands.
    return (node.line, node.column) if not isinstance(node.value, dict | list) and node.line else found


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
    return close[0] if close else None


Report = Callable[[Path, str, str], None]  # path, message, hint


@dataclass(slots=True)
class Checker:
    """Walks a tree beside a type. `report` is told every problem; the checked data comes back as plain values.

    `as_written`: paths (with "*" for any part) whose texts may be given as bare numbers or booleans, kept as they
    were written. `words` explains a pattern to people. `aliases` are keys that other tools use for ours.
    """

    report: Report
    as_written: frozenset[Path] = frozenset()
    words: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    language: str = "YAML"

    def check(self, node: Node, kind: mi.Type, path: Path = ()) -> object:
        """The value of `node` as plain data fit for msgspec.convert, as far as no problem was reported."""
        if isinstance(kind, mi.Metadata):
            return self.check(node, kind.type, path)
        if isinstance(kind, mi.UnionType):
            if node.value is None and kind.includes_none:
                return None
            return self.check(node, next(t for t in kind.types if not isinstance(t, mi.NoneType)), path)
        match kind:
            case mi.StructType():
                return self._struct(node, kind, path)
            case mi.DictType():
                return self._mapping(node, kind, path)
            case mi.VarTupleType() | mi.ListType():
                return self._sequence(node, kind, path)
            case mi.StrType():
                return self._text(node, kind, path)
            case mi.IntType() | mi.FloatType():
                return self._number(node, kind, path)
            case mi.BoolType():
                return self._boolean(node, path)
            case mi.LiteralType():
                return self._choice(node, kind, path)
        raise TypeError(f"no rule for {kind!r} at {written(path)}")  # a new kind of field: a bug here, not the user's

    # --- blocks -------------------------------------------------------------------------------------------

    def _struct(self, node: Node, kind: mi.StructType, path: Path) -> object:
        names = [f.encode_name for f in kind.fields]
        if not isinstance(node.value, dict):
            self.report(path, f"a mapping is needed, this is {describe(node)}", f"its keys: {', '.join(names)}")
            return None
        result: dict[str, object] = {}
        fields = {f.encode_name: f for f in kind.fields}
        for key, child in node.value.items():
            known = fields.get(key)
            if known is None:
                self._unknown(key, names, path)
            else:
                result[key] = self.check(child, known.type, (*path, key))
        for name, known in fields.items():
            if known.required and name not in node.value:
                self.report((*path, name), "this key is missing", "")
        return result

    def _unknown(self, key: str, names: list[str], path: Path) -> None:
        if key == "<<":
            self.report((*path, key), "merging with << is not supported", "write the keys out")
            return
        meant = self.aliases.get(key)
        if meant not in names:
            meant = nearest(key, names)
        hint = f"did you mean {meant}?" if meant else f"known here: {', '.join(names)}"
        self.report((*path, key), "unknown key", hint)

    def _mapping(self, node: Node, kind: mi.DictType, path: Path) -> object:
        if not isinstance(node.value, dict):
            hint = "write NAME: value lines, without dashes" if isinstance(node.value, list) else ""
            self.report(path, f"a mapping is needed, this is {describe(node)}", hint)
            return None
        return {key: self.check(child, kind.value_type, (*path, key)) for key, child in node.value.items()}

    def _sequence(self, node: Node, kind: mi.VarTupleType | mi.ListType, path: Path) -> object:
        if not isinstance(node.value, list):
            hint = "write a list: [a, b]"
            if isinstance(node.value, str) and isinstance(kind.item_type, mi.StrType):
                hint = f"write a list: {as_list(node.value)}"
            self.report(path, f"a list is needed, this is {describe(node)}", hint)
            return None
        return [self.check(child, kind.item_type, (*path, i)) for i, child in enumerate(node.value)]

    # --- scalars ------------------------------------------------------------------------------------------

    def _text(self, node: Node, kind: mi.StrType, path: Path) -> object:
        value = node.value
        if isinstance(value, bool | int | float) and self._kept_as_written(path):
            value = node.text
        if not isinstance(value, str):
            hint = ""
            if isinstance(value, bool | int | float):
                hint = f'put it in quotes: "{node.text}"'
            elif value is None:
                hint = 'write "" for an empty text, or leave the key out'
            self.report(path, f"a text is needed, this is {describe(node)}", hint)
            return None
        if "\0" in value or _SURROGATE.search(value):
            self.report(path, "must not contain a NUL character or half a surrogate pair", "")
        elif kind.min_length and len(value) < kind.min_length:
            self.report(path, "must not be empty" if kind.min_length == 1 else f"shorter than {kind.min_length}", "")
        elif kind.max_length and len(value) > kind.max_length:
            self.report(path, f"longer than {kind.max_length} characters", "")
        elif kind.pattern and (not re.search(kind.pattern, value) or value.endswith("\n")):
            words = self.words.get(kind.pattern, f"must match {kind.pattern}")
            self.report(path, f"{shorten(value)} does not fit: {words}", "")
        return value

    def _kept_as_written(self, path: Path) -> bool:
        return any(
            len(rule) == len(path) and all(r in ("*", p) for r, p in zip(rule, path, strict=True))
            for rule in self.as_written
        )

    def _number(self, node: Node, kind: mi.IntType | mi.FloatType, path: Path) -> object:
        value = node.value
        whole = isinstance(kind, mi.IntType)
        if isinstance(value, bool) or not isinstance(value, int | float):
            needed = "a whole number" if whole else "a number"
            self.report(path, f"{needed} is needed, this is {describe(node)}", number_hint(node, path))
            return None
        if isinstance(value, float) and (whole or not math.isfinite(value)):
            hint = f"write {int(value)}" if math.isfinite(value) and value.is_integer() else ""
            self.report(path, f"a {'whole' if whole else 'finite'} number is needed, this is {node.text}", hint)
            return None
        low = kind.ge if kind.ge is not None else kind.gt
        if (kind.ge is not None and value < kind.ge) or (kind.gt is not None and value <= kind.gt):
            relation = "at least" if kind.ge is not None else "more than"
            self.report(path, f"must be {relation} {low}, this is {node.text}", "")
        elif (kind.le is not None and value > kind.le) or (kind.lt is not None and value >= kind.lt):
            relation = f"at most {kind.le}" if kind.le is not None else f"less than {kind.lt}"
            self.report(path, f"must be {relation}, this is {node.text}", "")
        return value

    def _boolean(self, node: Node, path: Path) -> object:
        if isinstance(node.value, bool):
            return node.value
        hint = ""
        if isinstance(node.value, str) and node.value.lower() in _YES_NO:
            meant = _YES_NO[node.value.lower()]
            hint = f"write {meant}" if node.plain else f"write {meant} without quotes"
            if self.language == "YAML" and node.plain:
                hint += f": {node.value} is a text here, unlike in YAML 1.1"
        elif node.value in (0, 1):
            hint = f"write {'true' if node.value else 'false'}"
        self.report(path, f"true or false is needed, this is {describe(node)}", hint)
        return None

    def _choice(self, node: Node, kind: mi.LiteralType, path: Path) -> object:
        choices = [str(v) for v in kind.values]
        if node.value in kind.values and not isinstance(node.value, bool):
            return node.value
        meant = nearest(node.value, choices) if isinstance(node.value, str) else None
        hint = f"did you mean {meant}?" if meant else ""
        self.report(path, f"must be one of {', '.join(choices)}, this is {describe(node)}", hint)
        return None


_YES_NO = {"yes": "true", "y": "true", "on": "true", "true": "true"} | dict.fromkeys(
    ("no", "n", "off", "false"), "false"
)


def shorten(text: str) -> str:
    """A text in quotes, cut where a message would become unreadable."""
    shown = text if len(text) <= 60 else text[:57] + "..."
    return '"' + shown.replace("\n", "\\n") + '"'


def describe(node: Node) -> str:
    """What a value is, for a message."""
    match node.value:
        case None:
            return "empty"
        case bool():
            return node.text or str(node.value).lower()
        case int() | float():
            return f"the number {shorten(node.text)[1:-1]}"
        case str():
            return f"the text {shorten(node.value)}"
        case dict():
            return "a mapping"
        case _:
            return "a list"


def as_list(text: str) -> str:
    """A command line as the list it should have been."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    return msgspec.json.encode(words).decode()


_SURROGATE = re.compile("[\ud800-\udfff]")
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")
_MEGABYTES = {"": 1.0, "k": 1 / 1024, "m": 1.0, "g": 1024.0, "t": 1024.0 * 1024}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def number_hint(node: Node, path: Path) -> str:
    """What to write instead of "256m" or "30s", by the unit that the key's name ends with."""
    if not isinstance(node.value, str) or not path:
        return ""
    key = next((str(p) for p in reversed(path) if isinstance(p, str)), "")
    match = _SIZE.match(node.value)
    if match is None:
        return ""
    amount, unit = float(match[1]), match[2].lower()
    if key.endswith("_mb"):
        factor, name = _MEGABYTES.get(unit.removesuffix("b").removesuffix("i")), "megabytes"
    elif key.endswith("_s"):
        factor, name = _SECONDS.get(unit), "seconds"
    else:
        factor, name = (1.0 if not unit else None), ""
    if factor is None:
        return f"a number of {name}, without a unit" if name else ""
    value = amount * factor
    shown = str(int(value)) if value.is_integer() else f"{value:g}"
    return f"write {shown}" + (f", a number of {name}" if name and unit else ", without quotes")
