"""The picture of a search: how good each block is alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..blocks.block_map import kind_of
from ..errors import SurgicalError
from ..rendering import new_figure
from .result import SearchResult


def plot_profile(result: SearchResult, path: str | Path) -> None:
    """A bar for each block that was tuned alone, error bars where it had several seeds; `head` and `all` are lines.

    The axis starts below the lowest bar, not at 0: the blocks differ by little beside what they have in common.

    Raises:
        SurgicalError: no block was tuned alone.
    """
    tried = result.profile
    heads = tuple(name for name in result.blocks if kind_of(name) == "head")
    bars = {name: metric for name, metric in tried.items() if name not in heads}
    if not any(math.isfinite(metric) for metric in bars.values()):
        raise SurgicalError(
            f"{result.procedure} tuned no block alone (the head apart) to the end, so there is no profile to draw: "
            "search with sweep."
        )
    known = {candidate.blocks: candidate.metric for candidate in result.candidates}
    references = {"all": (result.blocks, "#117733"), "head": (heads, "#cc6677")}
    lines = {name: (known[blocks], color) for name, (blocks, color) in references.items() if blocks in known}
    spread = [result.deviations.get(name, 0.0) for name in bars]
    ends = [metric + side * width for metric, width in zip(bars.values(), spread, strict=True) for side in (-1, 1)]
    ends = [end for end in (*ends, *(metric for metric, _ in lines.values())) if math.isfinite(end)]
    margin = 0.08 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    floor = min(ends) - margin if min(ends) < 0 else max(0.0, min(ends) - margin)

    longest = max(map(len, bars))
    is_turned = longest > 4 and len(bars) > 3
    size = max(5.0, 1.8 + 0.42 * len(bars)), 3.6 + (0.09 * longest if is_turned else 0)
    with new_figure(path, *size) as figure:
        axes = figure.subplots()
        places = range(len(bars))
        heights = [0.0 if math.isnan(metric) else metric - floor for metric in bars.values()]
        axes.bar(places, heights, bottom=floor, color="#4477aa", width=0.7)
        for position, (metric, width) in enumerate(zip(bars.values(), spread, strict=True)):
            if width and math.isfinite(metric):
                axes.errorbar(position, metric, yerr=width, color="#222222", capsize=3, linewidth=1.2)
            if math.isnan(metric):
                white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                style: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 8, "bbox": white}
                axes.text(position, floor + margin / 4, "no metric", **style)
        lines = {name: line for name, line in lines.items() if math.isfinite(line[0])}
        for name, (metric, color) in lines.items():
            axes.axhline(metric, color=color, linestyle="--", linewidth=1.2, label=f"{name} {metric:.3g}")
        axes.set_ylim(floor, max(ends) + margin)
        axes.set_xticks(places, list(bars), rotation=90 if is_turned else 0)
        axes.set_xlabel("block tuned alone")
        axes.set_ylabel("validation metric")
        axes.set_title(result.procedure if len(result.procedure) <= 70 else result.procedure[:67] + "...", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if lines:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
