"""Dump the journal of a scheduler; replay a dump, decision by decision."""

from __future__ import annotations

from scheduler.codec import decode, encode
from scheduler.core import Scheduler
from scheduler.errors import ConfigurationError, InvariantError, JournalError
from scheduler.messages import Action, Event
from scheduler.recording import Journal, Window
from scheduler.snapshot import restore

__all__ = ["Journal", "Replay", "Window", "dump", "replay"]


def dump(scheduler: Scheduler, window: Window | None = None) -> bytes:
    """The retained window of its journal. With a `window` taken before (scheduler.journal.window(), cheap) it
    may run in a thread: about 60 ms for 10,000 events."""
    return encode(scheduler.journal.window() if window is None else window, scheduler.limits, scheduler.epoch)


class _Drawn:
    """Gives the recorded chance numbers again."""

    def __init__(self, values: list[float]) -> None:
        self._values = iter(values)

    def random(self) -> float:
        value = next(self._values, None)
        if value is None:
            raise JournalError("the replay asks for more chance numbers than were recorded")
        return value


class Replay:
    """A core in the state in which the window begins, and the events that follow: step() through them and look
    at `scheduler` between."""

    def __init__(self, data: bytes) -> None:
        """Raises JournalError when `data` is no dump, or one that does not fit together."""
        recording = decode(data)
        self.entries = recording.entries
        self.position = 0
        self.scheduler = Scheduler(recording.limits, epoch=recording.epoch, rng=_Drawn(recording.draws))
        self.scheduler.restore(lambda ledger: restore(ledger, recording.state))

    def step(self) -> tuple[float, Event, list[Action]] | None:
        """Decide on the next event again; None at the end. One that was refused has no actions."""
        if self.position == len(self.entries):
            return None
        now, event = self.entries[self.position]
        self.position += 1
        try:
            actions = self.scheduler.handle(event, now)
        except (InvariantError, ConfigurationError):
            actions = []
        return now, event, actions


def replay(data: bytes) -> list[tuple[float, Event, list[Action]]]:
    """Every event of the window with the actions it led to. Raises JournalError as Replay does."""
    run = Replay(data)
    steps = []
    while (step := run.step()) is not None:
        steps.append(step)
    return steps
