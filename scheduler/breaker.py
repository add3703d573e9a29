"""The breaker that keeps a start that fails again and again from being tried again and again."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

JITTER = 0.2  # the part of a back-off that chance decides, so that revisions do not retry in step
MAX_DOUBLINGS = 40


class BreakerState(enum.StrEnum):
    """closed: starts go; open: none goes before `until`; half_open: one goes, its end decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True, eq=False)
class Breaker:
    """Counts failures in a row. `threshold` of them open it; the back-off doubles with each opening, up to
    `max_s`; after it one start goes through (half open), and its success closes the breaker."""

    threshold: int
    base_s: float
    max_s: float
    failures: int = 0
    opens: int = 0  # openings in a row; 0: closed
    until: float = -math.inf
    detail: str = ""
    permanent: bool = False

    def state(self, now: float) -> BreakerState:
        if not self.opens:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.until else BreakerState.HALF_OPEN

    def blocks(self, now: float, in_flight: int) -> bool:
        """True: no start may go now, `in_flight` being those that are under way already."""
        return self.opens > 0 and (now < self.until or in_flight > 0)

    def failed(self, now: float, detail: str, draw: Callable[[], float], *, permanent: bool = False) -> None:
        """Count a failure. `draw` gives a chance number in [0, 1) when a back-off is set."""
        self.detail = detail
        self.failures += 1
        if permanent:
            self.permanent = True
            self.opens = max(self.opens, 1)
            self.until = now + self._jittered(self.max_s, draw)
        elif now < self.until:
            return  # a start from before the opening: the back-off already counts its fellow
        elif self.opens or self.failures >= self.threshold:
            self.opens += 1
            back_off_s = self.base_s * 2.0 ** min(self.opens - 1, MAX_DOUBLINGS)
            self.until = now + self._jittered(min(back_off_s, self.max_s), draw)

    @staticmethod
    def _jittered(seconds: float, draw: Callable[[], float]) -> float:
        return seconds * (1.0 - JITTER + JITTER * draw())

    def close(self) -> None:
        """A start succeeded, or a user says so."""
        self.failures = 0
        self.opens = 0
        self.until = -math.inf
        self.detail = ""
        self.permanent = False
