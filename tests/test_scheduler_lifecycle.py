"""The table of states, and that nothing goes round it."""

from __future__ import annotations

import ast
from itertools import product
from pathlib import Path

import pytest
from scheduler_world import World

import scheduler
from scheduler.errors import InvariantError
from scheduler.lifecycle import TRANSITIONS, transition
from scheduler.model import InstanceState
from scheduler.records import Instance

LAWFUL = {
    "starting idle",
    "starting stopping",
    "starting dead",
    "idle busy",
    "idle frozen",
    "idle stopping",
    "busy idle",
    "busy stopping",
    "frozen busy",
    "frozen idle",
    "frozen stopping",
    "stopping dead",
}


def an_instance() -> Instance:
    world = World()
    world.deploy(min_instances=1)
    return world.core._ledger.instances["w-1"]


@pytest.mark.parametrize(("origin", "to"), list(product(InstanceState, InstanceState)))
def test_the_table(origin: InstanceState, to: InstanceState) -> None:
    instance = an_instance()
    instance.state = origin
    if f"{origin} {to}" in LAWFUL:
        transition(instance, to)
        assert instance.state is to
    else:
        with pytest.raises(InvariantError, match=f"w-1 cannot go from {origin} to {to}"):
            transition(instance, to)
        assert instance.state is origin


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(InstanceState)


def test_only_lifecycle_sets_a_state() -> None:
    for path in Path(scheduler.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr == "state":
                    # A segment of the journal has a state too: that of the whole core.
                    assert path.name in ("lifecycle.py", "recording.py"), f"{path.name}:{node.lineno}"
