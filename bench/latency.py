"""Latencies, recorded cheaply and summed up in an HdrHistogram."""

from __future__ import annotations

from collections.abc import Mapping

from hdrh.histogram import HdrHistogram

UNIT_NS = 100  # what one step of the histogram is
LONGEST = 3600 * 10_000_000  # an hour, in units
SIGNIFICANT_DIGITS = 3
EXACT = 10_000  # units kept apart one by one; above, a step is a tenth of a thousandth of its decade
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


class Recorder:
    """Latencies of one kind.

    Recording is a dictionary's update, of at most some 60,000 entries; the histogram is made afterwards. To record
    into it at once costs ten times as much, and the measured program would bear that in its tail.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def record(self, latency_ns: int) -> None:
        """Add one latency; anything longer than an hour counts as an hour."""
        counts = self._counts
        unit = latency_ns // UNIT_NS
        if unit >= EXACT:
            unit = _rounded(min(unit, LONGEST))
        counts[unit] = counts.get(unit, 0) + 1

    def counts(self) -> dict[int, int]:
        """Latency in units of 100 ns to how often it was seen: what merge() takes."""
        return self._counts

    def merge(self, counts: Mapping[int, int]) -> None:
        """Add what another recorder saw."""
        for unit, count in counts.items():
            self._counts[unit] = self._counts.get(unit, 0) + count

    def summary(self) -> dict[str, float]:
        """{"count", "min", "mean", "p50", "p90", "p99", "p99.9", "max"}, times in milliseconds; all 0 without any."""
        if not self._counts:
            return dict.fromkeys(("count", "min", "mean", *_NAMES.values(), "max"), 0)
        histogram = HdrHistogram(1, LONGEST, SIGNIFICANT_DIGITS)
        for unit, count in self._counts.items():
            histogram.record_value(max(unit, 1), count)
        total = int(histogram.get_total_count())
        values = {"count": total, "min": _ms(histogram.get_min_value()), "mean": _ms(histogram.get_mean_value())}
        for percent, name in _NAMES.items():
            values[name] = _ms(histogram.get_value_at_percentile(percent))
        values["max"] = _ms(histogram.get_max_value())
        return values


def _rounded(unit: int) -> int:
    step = 10
    while unit >= step * EXACT:
        step *= 10
    return unit - unit % step


_NAMES = {percent: f"p{percent:g}" for percent in PERCENTILES}


def _ms(units: float) -> float:
    return round(units * UNIT_NS / 1e6, 4)
