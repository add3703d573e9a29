"""When an open loop's requests are due: arithmetic only, the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass

SECOND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Pace:
    """`rate` requests a second in all, of which this is share `index` of `count`: shares interleave evenly.

    Each due time is computed from the start, so no error adds up over a long run.
    """

    rate: float
    start_ns: int
    index: int = 0
    count: int = 1

    def due_ns(self, number: int) -> int:
        """When this share's request `number` (from 0) is due."""
        return self.start_ns + round((number * self.count + self.index) * SECOND_NS / self.rate)

    def total(self, duration_s: float) -> int:
        """How many of this share's requests are due before the duration ends."""
        whole = -(-round(self.rate * duration_s * 1e6) // 1_000_000)  # rounded up; a float's dust is not a request
        return max(0, -(-(whole - self.index) // self.count))


def share(total: int, index: int, count: int) -> int:
    """How many of `total` things share `index` of `count` gets: they differ by one at most."""
    return total // count + (1 if index < total % count else 0)
