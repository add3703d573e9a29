"""One heap of what is due when, with at most one live entry for each owner."""

from __future__ import annotations

import heapq
import math

from scheduler.records import Timed

SLACK = 64  # stale entries that are never worth a clean-up


class Timers:
    """Entries are moved lazily: an owner whose time moves later keeps its entry, which fires early; the owner
    looks again and arms anew. So a warm hit pushes nothing. Stale entries never outnumber live ones by more
    than SLACK."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Timed]] = []
        self.count = 0
        self._stale = 0

    def arm(self, owner: Timed, at: float) -> None:
        """Make sure that `owner` fires at `at` or earlier. inf: nothing is due."""
        if owner.timer_at <= at:
            return
        if owner.timer_id:
            self._stale += 1
        self.count += 1
        owner.timer_at = at
        owner.timer_id = self.count
        heapq.heappush(self.heap, (at, self.count, owner))
        if self._stale > SLACK + len(self.heap) // 2:
            self._compact()

    def disarm(self, owner: Timed) -> None:
        if owner.timer_id:
            owner.timer_id = 0
            owner.timer_at = math.inf
            self._stale += 1
            if self._stale > SLACK + len(self.heap) // 2:
                self._compact()

    def next_at(self) -> float:
        """When the first live entry fires; inf when there is none."""
        heap = self.heap
        while heap:
            at, entry, owner = heap[0]
            if owner.timer_id == entry:
                return at
            heapq.heappop(heap)
            self._stale -= 1
        return math.inf

    def pop_due(self, now: float) -> Timed | None:
        """The next owner whose entry is due, disarmed; None when none is."""
        at = self.next_at()
        if at > now or at == math.inf:
            return None
        owner = heapq.heappop(self.heap)[2]
        owner.timer_id = 0
        owner.timer_at = math.inf
        return owner

    def restore(self, owners: list[Timed], count: int) -> None:
        """Put back the live entries that a snapshot holds."""
        self.heap = [(owner.timer_at, owner.timer_id, owner) for owner in owners if owner.timer_id]
        heapq.heapify(self.heap)
        self.count = count
        self._stale = 0

    def _compact(self) -> None:
        self.heap = [entry for entry in self.heap if entry[2].timer_id == entry[1]]
        heapq.heapify(self.heap)
        self._stale = 0
