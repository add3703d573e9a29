"""The states of an instance and the ways between them. The only file that sets a state."""

from __future__ import annotations

from scheduler.errors import InvariantError
from scheduler.model import InstanceState
from scheduler.records import Instance

_S = InstanceState

TRANSITIONS: dict[InstanceState, frozenset[InstanceState]] = {
    _S.STARTING: frozenset({_S.IDLE, _S.STOPPING, _S.DEAD}),  # prepared; cancelled; failed
    _S.IDLE: frozenset({_S.BUSY, _S.FROZEN, _S.STOPPING}),
    _S.BUSY: frozenset({_S.IDLE, _S.STOPPING}),
    _S.FROZEN: frozenset({_S.BUSY, _S.IDLE, _S.STOPPING}),  # a grant thaws; a freeze that failed
    _S.STOPPING: frozenset({_S.DEAD}),
    _S.DEAD: frozenset(),
}


def transition(instance: Instance, to: InstanceState) -> None:
    """Set the state. Raises InvariantError, and changes nothing, where the table has no such way."""
    if to not in TRANSITIONS[instance.state]:
        raise InvariantError(f"instance {instance.id} cannot go from {instance.state} to {to}")
    instance.state = to


def require(instance: Instance, *states: InstanceState, event: str) -> None:
    """Raise InvariantError unless the instance is in one of the states, in which `event` is possible."""
    if instance.state not in states:
        raise InvariantError(f"{event} for instance {instance.id}, which is {instance.state}")


def place(instance: Instance, state: InstanceState) -> None:
    """Give a restored instance the state it was captured in, which needs no way to it."""
    instance.state = state
