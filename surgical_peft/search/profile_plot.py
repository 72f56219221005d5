"""The picture of a search: how good each block is alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..blocks.block_map import kind_of
from ..errors import SurgicalError
from ..rendering import mark_cut, new_figure
from .result import SearchResult, state_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE = "#4477aa"
_WITHOUT = "no metric"
_OFFSET: dict[str, Any] = {"textcoords": "offset points", "va": "bottom"}


def plot_profile(results: Mapping[str, SearchResult], path: str | Path, metric: str = "validation metric") -> None:
    """A bar for each block that was tuned alone, a panel for each entry of `results` (title -> result).

    Error bars where it had several seeds; the head and all blocks together are lines. The axis begins at 0 where the
    lowest bar is less than half of the highest; else it is cut, and marked as that: the blocks differ by little beside
    what they have in common.

    Raises:
        SurgicalError: no block was tuned alone.
    """
    profiles = {title: _bars_of(result) for title, result in results.items()}
    longest = max(len(name) for bars in profiles.values() for name in bars)
    most = max(map(len, profiles.values()))
    is_turned = longest > 4 and most > 3
    width = len(results) * max(5.2, 2.0 + 0.46 * most)
    with new_figure(path, width, 4.0 + (0.09 * longest if is_turned else 0)) as figure:
        figure.suptitle("Which block to tune: each of them tuned alone", fontsize=11)
        panels = zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True)
        for axes, (title, result) in panels:
            _draw(axes, result, profiles[title])
            axes.set_xticks(range(len(profiles[title])), list(profiles[title]), rotation=90 if is_turned else 0)
            spread = "\nthin lines: ± a standard deviation over the seeds" if result.deviations else ""
            axes.set_xlabel(f"block tuned alone, input at the left{spread}")
            axes.set_ylabel(f"{metric}, higher = better{axes.get_ylabel()}")
            axes.set_title(title, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)


def _bars_of(result: SearchResult) -> dict[str, float]:
    bars = {name: metric for name, metric in result.profile.items() if kind_of(name) != "head"}
    if not any(math.isfinite(metric) for metric in bars.values()):
        raise SurgicalError(
            f"{result.procedure} tuned no block alone (the head apart) to the end, so there is no profile to draw: "
            "search with sweep."
        )
    return bars


def _draw(axes: Axes, result: SearchResult, bars: Mapping[str, float]) -> None:
    """The bars, error bars, lines and numbers of one panel; a hatched bar to the top for what has no metric."""
    known = {candidate.blocks: candidate.metric for candidate in result.candidates}
    heads = tuple(name for name in result.blocks if kind_of(name) == "head")
    references = {"all blocks": (result.blocks, "#117733"), "head": (heads, "#cc6677")}
    lines = {name: (known[blocks], color) for name, (blocks, color) in references.items() if blocks in known}
    lines = {name: line for name, line in lines.items() if math.isfinite(line[0])}
    spread = [result.deviations.get(name, 0.0) for name in bars]
    ends = [metric + side * width for metric, width in zip(bars.values(), spread, strict=True) for side in (-1, 1)]
    ends = [end for end in (*ends, *(metric for metric, _ in lines.values())) if math.isfinite(end)]
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    is_cut = 0 < high / 2 <= low
    floor = low - margin if is_cut or low < 0 else 0.0
    base = floor if is_cut else 0.0
    for number, ((name, metric), width) in enumerate(zip(bars.items(), spread, strict=True)):
        if math.isnan(metric):
            state = state_of([trial for trial in result.trials if trial.blocks == (name,)])
            _without_metric(axes, number, floor, high, state.replace("pruned", "given up"))
            continue
        axes.bar(number, metric - base, bottom=base, color=_BLUE, width=0.8)
        if width:
            axes.errorbar(number, metric, yerr=width, color="#222222", capsize=3, linewidth=1.2)
        is_inside = metric - base > 1.5 * margin  # where no line and no error bar is
        look: dict[str, Any] = {"color": "white" if is_inside else "#222222", "ha": "center", "fontsize": 7}
        axes.annotate(f"{metric:.3g}", (number, base if is_inside else metric + width), (0, 3), **_OFFSET, **look)
    for name, (metric, color) in lines.items():
        axes.axhline(metric, color=color, linestyle="--", linewidth=1.2, label=f"{name} {metric:.3g}")
    axes.set_ylim(floor, max(high, 0.0) + 1.5 * margin)
    if is_cut:
        mark_cut(axes, "y")
    elif low < 0:
        axes.axhline(0, color="#222222", linewidth=0.8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _without_metric(axes: Axes, number: int, floor: float, high: float, state: str) -> None:
    """A hatched bar to the top, which says what became of the block."""
    is_first = _WITHOUT not in axes.get_legend_handles_labels()[1]
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": "#bbbbbb", "hatch": "///", "width": 0.8}
    axes.bar(number, high - floor, bottom=floor, label=_WITHOUT if is_first else None, **look)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.text(number, (floor + high) / 2, state, rotation=90, ha="center", va="center", fontsize=8, bbox=box)
