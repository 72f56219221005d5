"""Predicted gain of one step of Adam, with credit for the depth of a unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..scores import is_head
from .adam_gain import gains_of
from .criterion import of_model
from .trial import Trial

LITTLE = 1 / 16  # of the largest gain: where a head has no more, inputs have changed, and depth counts for nothing


@of_model(batches=16)
def depth_gain(trial: Trial) -> dict[str, float]:
    """`G_u * n_u^(1/4) * (16 G_head / max G)^d_u`: `adam_gain`, and the later the unit, the more it counts.

    `n_u` is the number of weights of unit `u`, `d_u` the share of the repeated layers that lie before it: 0 for
    embeddings, 1 for a head. What an early unit gains in one step is told too well, to first order: all later layers
    bend what it does. How much too well, the head says: its own gain is large where labels changed, which late units
    answer to, and small where inputs did. A model without a head, or one that gets no gradient, has `e^d_u` instead.

    Range: 0 upwards, no unit: `G_u` and `n_u` are divided by the largest. Cost: one forward and backward pass a batch,
    a gradient and two float32 numbers for each weight, and the outputs of the repeated layers. Gradients alone: the
    best criterion without a training in benchmarks/criteria; the numbers 1/4 and 16 were chosen there, on classifiers
    of six layers.

    Source: ours. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="depth_gain")
    """
    gains, _ = gains_of(trial, range(len(trial.batches)))
    return by_depth(trial, gains)


def by_depth(trial: Trial, gains: Mapping[str, float]) -> dict[str, float]:
    """`depth_gain` of units, given the `adam_gain` of each."""
    of_block: dict[str, float] = {}  # a unit may be less than a block, and gains add up
    for name, gain in gains.items():
        of_block[trial.blocks[name]] = of_block.get(trial.blocks[name], 0.0) + gain
    head = sum(gain for block, gain in of_block.items() if is_head(block))
    credit = head / max(of_block.values()) / LITTLE if head else math.e
    sizes = {name: sum(weight.numel() for weight in trial.units[name].values()) for name in gains}
    most, largest = max(gains.values()) or 1.0, max(sizes.values())
    return {
        name: gain / most * (sizes[name] / largest) ** 0.25 * credit ** (1 - trial.share_run(name))
        for name, gain in gains.items()
    }
