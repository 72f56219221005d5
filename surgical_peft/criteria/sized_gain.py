"""Predicted gain of one step of Adam, with heads judged for their size."""

from __future__ import annotations

import math

from .adam_gain import gains_of
from .criterion import of_model
from .trial import Trial

MARGIN = 1.2  # by which a head has to be above the layers: about as high stands one where inputs changed, too


@of_model(batches=16)
def sized_gain(trial: Trial) -> dict[str, float]:
    """As `adam_gain`, by the largest; but heads come first, or not, by their gain over the root of their size.

    A head has few weights, and so a small gain even where nothing else has to change. `G_u / sqrt(n_u)` is about what
    the loss loses for the length of the step. If a head is, by that, more than 1.2 times as good as all repeated
    layers, it scores 1 + its `G_u` by the largest; else each has `G_u` by the largest. Embeddings and norms, also
    small, set no bar: they would stand above heads where labels changed.

    Range: 0 to 2, no unit. Cost: one forward and backward pass a batch, a gradient and two float32 numbers for each
    weight. Gradients alone: the cheapest criterion that told changed labels from changed inputs in
    benchmarks/criteria, where `probe` chose better.

    Source: ours. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="sized_gain")
    """
    gains, _ = gains_of(trial, range(len(trial.batches)))
    sizes = {name: sum(weight.numel() for weight in unit.values()) for name, unit in trial.units.items()}
    kinds = {name: trial.blocks[name].rpartition(".")[2] for name in gains}  # a layer's is its number
    by_size = {name: gain / math.sqrt(sizes[name]) for name, gain in gains.items()}
    bar = max((by_size[name] for name, kind in kinds.items() if kind.isdigit()), default=0.0)
    most = max(gains.values()) or 1.0
    return {
        name: gain / most + (kinds[name] == "head" and by_size[name] > MARGIN * bar) for name, gain in gains.items()
    }
