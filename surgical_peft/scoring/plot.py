"""Pictures of scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..criteria.criterion import GIVEN_UP, GUESSED
from ..rendering import new_figure
from .block_scores import BlockScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE = "#4477aa"
_LOOKS: dict[str, tuple[str, dict[str, Any]]] = {  # of bars that are no measurement of their own
    GIVEN_UP: ("given up early: a shorter training", {"facecolor": "#bbccdd", "hatch": "///"}),
    GUESSED: ("never trained: guessed from gradients", {"facecolor": "white", "hatch": "..."}),
}


def plot_scores(scores: Mapping[str, BlockScores], path: str | Path) -> None:
    """Bars of the raw scores, one panel for each entry of `scores` (title -> scores), first block at the top."""
    first = next(iter(scores.values()))
    rows = max(len(each.values) for each in scores.values())
    longest = max(len(name) for each in scores.values() for name in each.values)
    row_height, font_size = (0.28, 10) if rows <= 40 else (0.18, 7)
    width, height = len(scores) * (4.2 + 0.0075 * font_size * longest), 1.9 + row_height * rows
    with new_figure(path, width, height, dpi=min(150, 2**16 / height - 1)) as figure:  # PNG's limit
        figure.suptitle(f"Which {first.granularity}s to tune: {words_of(first.criterion)}", fontsize=11)
        for axes, (title, each) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
            draw_bars(axes, each.values, each.basis, font_size)
            axes.set_title(title, fontsize=10)
            source = f"mean of {each.num_batches} batches, " if each.num_batches else ""
            axes.set_xlabel(f"score ({each.criterion}), higher = tune\n{source}{each.model_name}")
            axes.set_ylabel(f"{each.granularity}, input at the top")
        if marked := {basis for each in scores.values() for basis in each.basis.values()}:
            from matplotlib.patches import Patch

            looks = [
                ("trained to the end", {"facecolor": _BLUE}),
                *(_LOOKS[basis] for basis in _LOOKS if basis in marked),
            ]
            handles = [Patch(edgecolor=_BLUE, label=label, **look) for label, look in looks]
            figure.legend(handles=handles, loc="outside lower center", frameon=False, fontsize=8)


def draw_bars(axes: Axes, values: Mapping[str, float], basis: Mapping[str, str], font_size: float = 10) -> None:
    """A labeled bar for each name, from zero; hatched where `basis` says that it is no measurement."""
    bars = axes.barh(list(values), list(values.values()), color=_BLUE, edgecolor=_BLUE)
    for name, bar in zip(values, bars, strict=True):
        if name in basis:
            bar.set(**_LOOKS[basis[name]][1])
    axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=0.8 * font_size)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.margins(x=0.22)
    if min(values.values()) >= 0:
        axes.set_xlim(left=0)
    else:
        axes.axvline(0, color="#222222", linewidth=0.8)
    axes.locator_params(axis="x", nbins=6)
    axes.tick_params(axis="y", labelsize=font_size)
    axes.spines[["top", "right"]].set_visible(False)


def words_of(criterion: str) -> str:
    """What a criterion of ours measures, as its module says it in a line; of others the name."""
    from importlib import import_module

    from .. import criteria

    if criterion not in criteria.__all__:
        return criterion
    line = (import_module(f"{criteria.__name__}.{criterion}").__doc__ or criterion).splitlines()[0].rstrip(".")
    return line[0].lower() + line[1:]
