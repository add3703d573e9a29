"""The bounded journal: what the core was told, and the state it was told it in."""

from __future__ import annotations

from collections.abc import Callable

from scheduler.messages import Event, Ticked
from scheduler.snapshot import State

Entry = tuple[float, Event]


class Segment:
    """A state, and what followed it."""

    __slots__ = ("draws", "entries", "state")

    def __init__(self, state: State) -> None:
        self.state = state
        self.entries: list[Entry] = []
        self.draws: list[float] = []


class Window:
    """A retained window of the journal, cut loose from it: encode it in any thread."""

    __slots__ = ("draws", "entries", "state")

    def __init__(self, segments: list[Segment]) -> None:
        self.state = segments[0].state
        self.entries = [entry for segment in segments for entry in segment.entries]
        self.draws = [value for segment in segments for value in segment.draws]


class Journal:
    """Keeps the last `entries` events at most (0: none), so that they can be replayed exactly.

    Two segments: when the younger is full a state is captured, and the older is dropped with its own. To keep
    the capture off the hot path, the first Ticked after three quarters of a segment takes it. Measured: 0.7
    ms at 1,000 instances, once in `entries`/2 events."""

    def __init__(self, entries: int, capture: Callable[[], State]) -> None:
        self._capture = capture
        self._keeps_older = entries > 1
        self._full = max(entries // 2, min(entries, 1))
        self._soon = max(self._full * 3 // 4, min(entries, 1))
        self._older: Segment | None = None
        self._younger = Segment(capture())

    def record(self, now: float, event: Event) -> None:
        """Keep an event that is about to be decided on."""
        entries = self._younger.entries
        if len(entries) >= self._soon:
            if not self._full:
                return
            if len(entries) >= self._full or type(event) is Ticked:
                self._older = self._younger if self._keeps_older else None
                self._younger = Segment(self._capture())
                entries = self._younger.entries
        entries.append((now, event))

    def restart(self) -> None:
        """Forget everything; the state now is the beginning."""
        self._older = None
        self._younger = Segment(self._capture())

    def drew(self, value: float) -> None:
        """Keep a chance number that a decision used."""
        if self._full:
            self._younger.draws.append(value)

    def __len__(self) -> int:
        return len(self._younger.entries) + (len(self._older.entries) if self._older else 0)

    def window(self) -> Window:
        """What is retained now."""
        if not self._full:
            return Window([Segment(self._capture())])
        return Window([self._younger] if self._older is None else [self._older, self._younger])
