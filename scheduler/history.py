"""Measured times, kept as one number each."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT = 0.2  # of the newest sample: the last ten or so decide


@dataclass(slots=True, eq=False)
class Estimate:
    """An exponentially weighted mean of seconds. `value_s` is None until there is a measurement."""

    value_s: float | None = None
    samples: int = 0

    def add(self, seconds: float) -> None:
        self.samples += 1
        value = self.value_s
        self.value_s = seconds if value is None else value + WEIGHT * (seconds - value)
