"""What goes wrong in a simulation, and what has happened in it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """How often what goes wrong, as probabilities; `idle_death_s` is the mean time to it where it is drawn."""

    start_fails: float = 0.0
    dies_idle: float = 0.0  # of an instance: it dies at some time after its start, whatever it is doing then
    idle_death_s: float = 30.0
    dies_in_request: float = 0.0  # these, of an answer
    garbage: float = 0.0
    silent: float = 0.0
    closes: float = 0.0


@dataclass(slots=True)
class Counts:
    """What has happened so far."""

    starts: int = 0  # that succeeded
    starts_failed: int = 0
    starts_cancelled: int = 0
    stops: int = 0
    deaths: int = 0  # by themselves
    live: int = 0
    max_live: int = 0
    starting: int = 0
    max_starting: int = 0
    requests: int = 0
    answers: int = 0
    max_serving: int = 0  # requests at a time in one instance
    freezes: int = 0
    thaws: int = 0
    stopped_while_serving: int = 0
    violations: list[str] = field(default_factory=list)
