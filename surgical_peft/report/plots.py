"""Pictures of scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import whole_file
from ..scores import BlockScores


def plot_scores(scores: Mapping[str, BlockScores], path: str | Path) -> None:
    """Bars of the raw scores, one panel for each entry of `scores` (title -> scores), first block at the top."""
    rows = max(len(each.values) for each in scores.values())
    figure = Figure(figsize=(1.2 + 4.4 * len(scores), 1.4 + 0.28 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, each) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        bars = axes.barh(list(each.values), list(each.values.values()), color="#4477aa")
        axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.16)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"{each.criterion} (mean of {each.num_batches} batches)")
        axes.set_ylabel(each.granularity)
        axes.spines[["top", "right"]].set_visible(False)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150)
