"""Predicted gain of one step of Adam, with heads judged for their size."""

from __future__ import annotations

from .adam_gain import gains_of
from .criterion import of_model
from .trial import Trial

HEAD = 0.6  # fitted on the design shifts of benchmarks/criteria: .52 to .7 choose alike there


@of_model(batches=16)
def sized_gain(trial: Trial) -> dict[str, float]:
    """As `adam_gain`, by the largest; but heads come first, or not, by their gain over their number of weights^0.6.

    A head has few weights, and so a small gain even where nothing else has to change. If, by `G_u / n_u^0.6`, a head
    is above all units that are no head, it scores 1 + its `G_u` by the largest; else each has `G_u` by the largest.

    Range: 0 to 2, no unit. Cost: one forward and backward pass a batch, a gradient and two float32 numbers for each
    weight. Gradients alone: the cheapest criterion that told changed labels from changed inputs in
    benchmarks/criteria, where `probe` chose better.

    Source: ours; the power is fitted. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="sized_gain")
    """
    gains, _ = gains_of(trial, range(len(trial.batches)))
    sizes = {name: sum(weight.numel() for weight in unit.values()) for name, unit in trial.units.items()}
    heads = {name for name in gains if trial.blocks[name].rpartition(".")[2] == "head"}
    by_size = {name: gain / sizes[name] ** HEAD for name, gain in gains.items()}
    bar = max((by_size[name] for name in gains if name not in heads), default=0.0)
    most = max(gains.values()) or 1.0
    return {name: gain / most + (name in heads and by_size[name] > bar) for name, gain in gains.items()}
