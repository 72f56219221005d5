"""Pictures of scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..rendering import new_figure
from .block_scores import BlockScores


def plot_scores(scores: Mapping[str, BlockScores], path: str | Path) -> None:
    """Bars of the raw scores, one panel for each entry of `scores` (title -> scores), first block at the top."""
    rows = max(len(each.values) for each in scores.values())
    longest = max(len(name) for each in scores.values() for name in each.values)
    row_height, font_size = (0.28, 10) if rows <= 40 else (0.18, 7)
    width, height = len(scores) * (3.9 + 0.0075 * font_size * longest), 1.2 + row_height * rows
    with new_figure(path, width, height, dpi=min(150, 2**16 / height - 1)) as figure:  # PNG's limit
        for axes, (title, each) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
            bars = axes.barh(list(each.values), list(each.values.values()), color="#4477aa")
            axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=0.8 * font_size)
            axes.set_ylim(len(each.values) - 0.4, -0.6)
            axes.margins(x=0.22)
            if min(each.values.values()) >= 0:
                axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=6)
            axes.tick_params(axis="y", labelsize=font_size)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(f"{each.criterion}\nmean of {each.num_batches} batches")
            axes.set_ylabel(each.granularity)
            axes.spines[["top", "right"]].set_visible(False)
