"""The picture of advice: scores, gradients and how far features move."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...rendering import new_figure
from ...scoring.plot import draw_bars, words_of
from .advice import Advice

_KINDS = {
    "input": "the input moved",
    "features": "features moved",
    "output": "the output moved",
    "nothing": "nothing moved",
    None: "gradients of the new data alone",
}


def plot(advice: Advice, path: str | Path) -> None:
    """Scores, relative gradients and, with source data, how far features move; a bar for each block."""
    signature, floor = advice.signature, advice.signature.floor or {}
    scores, criterion = advice.scores.values, advice.scores.criterion
    panels: list[tuple[str, str, Mapping[str, float]]] = [
        ("gradients on the new data", "relative gradient norm,\nhigher = steeper for its weights", signature.gradients)
    ]
    if scores:
        panels.insert(0, ("scores", f"{words_of(criterion)} ({criterion}),\nhigher = tune", scores))
    if signature.moved:
        words = "energy coefficient, 0 to 1,\nhigher = further from the source"
        panels.append(("features, from source to new data", words, signature.moved))
    names = list(dict.fromkeys(name for *_, values in panels for name in values))
    size = 7 if len(names) > 40 else 10
    with new_figure(path, 3.6 * len(panels) + 1.2, 2.4 + 0.28 * len(names)) as figure:
        figure.suptitle(f"Signature of the shift: {_KINDS[signature.kind]}", fontsize=11)
        for axes, (title, unit, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw_bars(axes, {name: values.get(name, 0.0) for name in names}, {}, size)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(unit, fontsize=9)
            axes.set_ylabel("block, input at the top")
            for number, name in enumerate(names):
                if name not in values:
                    axes.texts[number].set_text("not measured")
            if values is signature.moved:
                chance = [floor.get(name, 0.0) for name in names]
                look = {"color": "#cc6677", "markersize": 11, "markeredgewidth": 2}
                axes.plot(chance, range(len(names)), "|", label="chance: two halves of the source", **look)
                axes.set_xlim(right=1.22 * max(*chance, *values.values()))
                axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.24))
