"""YAML and JSON texts as trees that know their lines.

The YAML read here is the part people mean: only true and false are booleans, only null, ~ and nothing are null,
and 22:22 or 2026-11-21 are texts. (YAML 1.1 makes a boolean of `no` and a number of 22:22.)
"""

from __future__ import annotations

import bisect
import json
import re

import yaml

from gateway.shape import Node, Path, Problem, Scalar, written

TEXT_BYTES = 262_144
MAX_NODES = 20_000  # counted after aliases are expanded, so that a few lines cannot become a million values
MAX_DEPTH = 40

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]{1,30}\.[0-9]{0,30}|\.[0-9]{1,30}|[0-9]{1,30}(?=[eE]))([eE][-+]?[0-9]{1,3})?")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_JSON_START = re.compile(r'\s*(\{\s*"|\[)')
_CORE_TAGS = frozenset("tag:yaml.org,2002:" + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq"))


class TextError(Exception):
    """The text cannot be read as a tree."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def scalar(text: str) -> Scalar:
    """The value of an unquoted YAML scalar."""
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text in _NULLS:
        return None
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def read_text(text: str, source: str) -> list[Node]:
    """The documents in a YAML or JSON text; empty documents are left out. Raises TextError.

    It is JSON when the source's name ends so, or when it begins like it: with {" or [. (YAML allows more between
    braces, so that as YAML some of JSON's mistakes would pass with another meaning.)
    """
    if len(text) > TEXT_BYTES:
        message = f"larger than {TEXT_BYTES // 1024} KB, which no set of function specs should be"
        raise TextError([Problem(source, 0, 0, "", message)])
    text = text.removeprefix("\ufeff")
    if source.endswith(".json") or _JSON_START.match(text):
        return [_read_json(text, source)]
    return _read_yaml(text, source)


# --- YAML -------------------------------------------------------------------------------------------------


class _Tree:
    """Turns composed YAML nodes into ours, counting what aliases expand to and collecting problems."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self.problems: list[Problem] = []

    def problem(self, mark: yaml.Mark, path: Path, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.source, mark.line + 1, mark.column + 1, written(path), message, hint))

    def build(self, node: yaml.Node, path: Path, depth: int = 0) -> Node:
        mark = node.start_mark
        self.count += 1
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            self.problem(mark, path, "too many values, or too deeply nested", "look for an alias (*name) in a circle")
            raise TextError(self.problems)
        if node.tag not in _CORE_TAGS:
            self.problem(mark, path, f"the tag {node.tag} is not supported", "write the plain value")
        place = (mark.line + 1, mark.column + 1)
        match node:
            case yaml.MappingNode():
                result = Node({}, *place)
                self._mapping(node, result, path, depth)
                return result
            case yaml.SequenceNode():
                items = [self.build(child, (*path, i), depth + 1) for i, child in enumerate(node.value)]
                return Node(items, *place)
            case yaml.ScalarNode():
                plain = node.style is None
                return Node(scalar(node.value) if plain else node.value, *place, text=node.value, plain=plain)
        raise TypeError(f"no rule for {node!r}")

    def _mapping(self, node: yaml.MappingNode, result: Node, path: Path, depth: int) -> None:
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(mark, path, "a key must be a plain word")
                continue
            key = key_node.value
            if key in children:
                first = result.keys[key][0]
                self.problem(mark, (*path, key), f"the key is there twice, first in line {first}", "keep one of them")
                continue
            result.keys[key] = (mark.line + 1, mark.column + 1)
            children[key] = self.build(value_node, (*path, key), depth + 1)
        result.value = children


def _read_yaml(text: str, source: str) -> list[Node]:
    tree = _Tree(source)
    nodes: list[Node] = []
    try:
        # The base loader resolves nothing, so that a scalar's own text is what comes.
        for document in yaml.compose_all(text, Loader=yaml.BaseLoader):
            node = tree.build(document, ())
            if node.value is not None:
                nodes.append(node)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        message = f"not readable as YAML: {exc.problem or exc.context or exc}"
        raise TextError([*tree.problems, Problem(source, line, column, "", message, _yaml_hint(message))]) from None
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        message = f"the character U+{_code_point(exc.character):04X} is not allowed in YAML"
        raise TextError([*tree.problems, Problem(source, line, 0, "", message)]) from None
    except RecursionError:
        raise TextError([Problem(source, 0, 0, "", "nested too deeply")]) from None
    if tree.problems:
        raise TextError(tree.problems)
    return nodes


def _code_point(character: object) -> int:
    return character if isinstance(character, int) else ord(str(character))


def _yaml_hint(message: str) -> str:
    if "'\\t'" in message:
        return "YAML indents with spaces, not with tabs"
    if "mapping values are not allowed" in message:
        return "check the indentation, and quote a text that contains a colon and a space"
    if "expected <block end>" in message:
        return "check the indentation of this line against the lines above"
    return ""


# --- JSON -------------------------------------------------------------------------------------------------


def _read_json(text: str, source: str) -> Node:
    try:
        json.loads(text)
    except json.JSONDecodeError as exc:
        message = f"not readable as JSON: {exc.msg[:1].lower()}{exc.msg[1:]}"
        raise TextError([Problem(source, exc.lineno, exc.colno, "", message)]) from None
    except (RecursionError, ValueError):
        raise TextError(
            [Problem(source, 0, 0, "", "not readable as JSON: nested too deeply, or too long a number")]
        ) from None
    reader = _Json(text, source)
    node = reader.value((), 0)
    if reader.problems:
        raise TextError(reader.problems)
    return node


_BLANK = re.compile(r"[ \t\r\n]*")


class _Json:
    """A second walk over a text that is known to be JSON, for the positions that json does not give."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.at = 0
        self.problems: list[Problem] = []
        self._decode = json.JSONDecoder().raw_decode
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def place(self) -> tuple[int, int]:
        line = bisect.bisect_right(self._starts, self.at)
        return line, self.at - self._starts[line - 1] + 1

    def skip(self, characters: int = 0) -> str:
        """Go on by so many characters and over blanks; the character there."""
        end = _BLANK.match(self.text, self.at + characters)
        self.at = end.end() if end else self.at
        return self.text[self.at : self.at + 1]

    def value(self, path: Path, depth: int) -> Node:
        first = self.skip()
        place = self.place()
        if depth > MAX_DEPTH:
            raise TextError([Problem(self.source, *place, written(path), "nested too deeply")])
        if first == "{":
            return self.mapping(path, place, depth)
        if first == "[":
            items: list[Node] = []
            if self.skip(1) != "]":
                items.append(self.value((*path, 0), depth + 1))
                while self.skip() == ",":
                    self.at += 1
                    items.append(self.value((*path, len(items)), depth + 1))
            self.at += 1
            return Node(items, *place)
        value, end = self._decode(self.text, self.at)
        text, self.at = self.text[self.at : end], end
        plain = not isinstance(value, str)
        return Node(value, *place, text=text if plain else value, plain=plain)

    def mapping(self, path: Path, place: tuple[int, int], depth: int) -> Node:
        result = Node(None, *place)
        children: dict[str, Node] = {}
        following = self.skip(1)
        while following != "}":
            key_place = self.place()
            key, self.at = self._decode(self.text, self.at)
            self.skip()
            self.at += 1  # the colon
            child = self.value((*path, key), depth + 1)
            if key in children:
                message = f"the key is there twice, first in line {result.keys[key][0]}"
                self.problems.append(
                    Problem(self.source, *key_place, written((*path, key)), message, "keep one of them")
                )
            else:
                children[key], result.keys[key] = child, key_place
            following = self.skip()
            if following == ",":
                following = self.skip(1)
        self.at += 1
        result.value = children
        return result
