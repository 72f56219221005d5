"""Report of a comparison as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ...rendering import mark_cut, new_figure
from .report import ComparisonReport, MethodRow
from .tables import scale_of, trainings_of

_FULL, _OTHER = "#222222", "#4477aa"


def plot(report: ComparisonReport, path: str | Path) -> None:
    """Every test result of each method, and the paired difference to full fine-tuning with its interval.

    Both axes are for what was trained; the model as it was may lie far outside, and is then written at the edge. What
    diverged has a line without points.
    """
    rows = sorted(report.methods, key=_mean)
    is_share, unit = scale_of(report)
    longest = max(len(row.method) for row in rows)
    with new_figure(path, 7.2 + 0.07 * longest, 2.3 + 0.3 * len(rows)) as figure:
        figure.suptitle("Which way of tuning adapts best: each at its best rate, the best at the top", fontsize=11)
        left, right = figure.subplots(1, 2, sharey=True)
        scale = 100 if is_share else 1
        _draw_results(left, rows, scale)
        _draw_differences(right, rows, scale)
        left.set_yticks(range(len(rows)), [row.method for row in rows])
        left.set_ylim(-0.6, len(rows) - 0.4)
        left.set_ylabel("method")
        left.set_xlabel(f"{report.split} {report.metric}{', %' * is_share}, higher = better")
        right.set_xlabel(f"to full fine-tuning{f',{unit}' if unit else ''}; above 0 = better")
        left.set_title(f"{trainings_of(report)}; line: mean", fontsize=9)
        right.set_title("paired, 95 % interval; filled: clear of zero", fontsize=9)
        if left.get_xlim()[0] > 0:
            mark_cut(left, "x")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)


def _mean(row: MethodRow) -> float:
    return -math.inf if row.has_diverged else row.mean


def _draw_results(axes: Axes, rows: Sequence[MethodRow], scale: int) -> None:
    told = [row for row in rows if row.rate is not None and not row.has_diverged]
    trained = [scale * value for row in told for value in row.results]
    margin = 0.08 * (max(trained) - min(trained)) or 1.0
    axes.set_xlim(min(trained) - margin, max(trained) + margin)
    for place, row in enumerate(rows):
        if row.has_diverged:
            axes.text(0.01, place, "diverged", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
            continue
        color = _FULL if row.to_full is None else _OTHER
        values = [scale * value for value in row.results]
        mean = statistics.fmean(values)
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=4, markeredgewidth=0)
        axes.plot([mean], [place], "|", color=color, markersize=13, markeredgewidth=2)
        _write_if_outside(axes, mean, place)


def _draw_differences(axes: Axes, rows: Sequence[MethodRow], scale: int) -> None:
    others = [row.to_full for row in rows if row.to_full is not None and row.rate is not None]
    means = [0.0, *(scale * difference.mean for difference in others)]
    halves = [scale * (difference.bounds[1] - difference.mean) for difference in others if difference.bounds]
    widest = min(max(halves), 3 * statistics.median(halves)) if halves else 0.0  # one wild method is cut
    margin = 1.1 * max(widest, 0.1 * (max(means) - min(means))) or 1.0
    axes.set_xlim(min(means) - margin, max(means) + margin)
    axes.axvline(0, color=_FULL, linewidth=1, linestyle="--")
    for place, row in enumerate(rows):
        if row.to_full is None:
            continue
        mean, bounds, fill = scale * row.to_full.mean, row.to_full.bounds, "white"
        if bounds:
            low, high = bounds
            axes.plot([scale * low, scale * high], [place, place], "-", color=_OTHER, linewidth=1.5)
            fill = "white" if low <= 0 <= high else _OTHER
        axes.plot([mean], [place], "o", color=_OTHER, markersize=5, markerfacecolor=fill)
        _write_if_outside(axes, mean, place)


def _write_if_outside(axes: Axes, value: float, place: int) -> None:
    low, high = axes.get_xlim()
    if not low <= value <= high:
        side, at = ("left", 0.01) if value < low else ("right", 0.99)
        how: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": side, "va": "center", "fontsize": 8}
        axes.text(at, place, f"{'◂ ' if value < low else ''}{value:.3g}{' ▸' if value > high else ''}", **how)
