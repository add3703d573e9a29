"""The picture of `poolbench start`: every sample, on a logarithmic axis, beside the plain start."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from bench.report import percentile

LANES = 9  # samples of a row are spread over so many heights, so that they do not hide each other


class NoPicture(Exception):
    """It cannot be drawn or written; says why."""


def check(path: Path) -> None:
    """Before the minutes that measuring takes: can there be a picture at all? Raises NoPicture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NoPicture(f"--plot needs matplotlib, which is not installed: {sys.executable} -m pip install matplotlib")
    if not path.absolute().parent.is_dir():
        raise NoPicture(f"{path} cannot be written: there is no directory {path.absolute().parent}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG (or what the suffix says). Raises NoPicture."""
    check(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = [(row["start"], row["samples_ms"]) for row in result["rows"]]
    series.append(("plain start", result["plain"]["samples_ms"]))
    series.reverse()  # the first row on top
    figure, axes = pyplot.subplots(figsize=(9, 0.7 * len(series) + 1.6), layout="constrained")
    for height, (_, samples) in enumerate(series):
        heights = [height + (lane % LANES - LANES // 2) * 0.06 for lane in range(len(samples))]
        axes.scatter(samples, heights, s=14, alpha=0.6, linewidths=0)
        median = percentile(samples, 50)  # as the table has it
        axes.plot([median, median], [height - 0.35, height + 0.35], color="black", linewidth=1.5)
        axes.annotate(f"{median:.3g} ms", (median, height + 0.37), fontsize=8, ha="center", va="bottom")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")  # 0.1, 1, 10: no powers
    axes.set_yticks(range(len(series)), [name for name, _ in series])
    axes.set_ylim(-0.6, len(series) - 0.2)
    axes.set_xlabel("latency of the answer, ms (each dot a sample, the line their median)")
    facts = result["machine"]
    axes.set_title(f"{result['function']} on {facts.get('backend', '?')}, {facts['cores']} cores", loc="left")
    axes.grid(axis="x", which="both", alpha=0.2)
    try:
        figure.savefig(path, dpi=140)
    except (OSError, ValueError) as exc:
        raise NoPicture(f"{path} cannot be written: {exc}") from None
    finally:
        pyplot.close(figure)
