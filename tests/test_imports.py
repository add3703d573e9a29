"""The house's one direction, and the purity of its core."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
# What a decision may be made of: data types, and nothing that reads a clock, chance, a file or the network.
PURE = frozenset(
    {"__future__", "abc", "bisect", "collections", "collections.abc", "copy", "dataclasses", "enum", "functools"}
    | {"hashlib", "heapq", "itertools", "json", "math", "operator", "statistics", "types", "typing"}
)
IMPURE_CALLS = frozenset({"open", "print", "input", "eval", "exec", "__import__", "breakpoint"})


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of each import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def impurities(source: str) -> list[str]:
    """What keeps a module of scheduler/ from being pure, as "line: what"."""
    tree = ast.parse(source)
    found = [
        f"{line}: imports {name}"
        for line, name in imported(tree)
        if name not in PURE and name.split(".")[0] != "scheduler"
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            found.append(f"{node.lineno}: awaits")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
            found.append(f"{node.lineno}: calls {node.func.id}()")
        elif isinstance(node, ast.Global):
            found.append(f"{node.lineno}: changes a global")
    return found


def test_imports_run_one_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out


def test_the_import_rule_can_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(
        '[tool.importlinter]\nroot_packages = ["gateway", "pool", "scheduler"]\n'
        '[[tool.importlinter.contracts]]\nname = "upside down"\ntype = "layers"\nlayers = ["scheduler", "pool"]\n'
    )
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(rules), no_cache=True) == 1
    assert "pool is not allowed to import scheduler" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "scheduler").rglob("*.py")), ids=lambda path: path.name)
def test_the_scheduler_is_pure(path: Path) -> None:
    assert impurities(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import trio",
        "import msgspec",
        "def f():\n    from time import monotonic",
        "import os.path",
        "import pool.spec",
        "from . import model",
        "async def f(): ...",
        "open('state')",
        "def f():\n    global count\n    count = 1",
    ],
)
def test_impurity_is_seen(source: str) -> None:
    assert impurities(source)


def test_the_pure_modules_are_the_standard_library_s() -> None:
    assert {name.split(".")[0] for name in PURE} <= sys.stdlib_module_names


def test_each_room_is_a_package_of_the_checkout() -> None:
    """An installed copy, or a tests/pool/, would be tested in place of the checkout."""
    import bench
    import gateway
    import pool
    import scheduler

    for room in (bench, gateway, pool, scheduler):
        assert room.__file__ == str(ROOT / room.__name__ / "__init__.py")
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_file_takes_a_name_that_shadows_or_says_nothing() -> None:
    refused = {"types.py", "queue.py", "sched.py", "signal.py", "http.py", "utils.py", "util.py", "helpers.py"}
    rooms = [ROOT / room for room in ("bench", "gateway", "pool", "scheduler")]
    found = [path for room in rooms for path in room.rglob("*.py") if path.name in refused]
    # In a sub-package a plain name shadows nothing: gateway/events/queue.py is the queue of events.
    assert [path for path in found if path.name != "queue.py" or path.parent in rooms] == []
