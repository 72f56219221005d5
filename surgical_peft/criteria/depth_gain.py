"""Predicted gain of one step of Adam, with credit for the depth of a unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..blocks.block_map import kind_of
from .adam_gain import gains_of_all
from .budget import GRADIENTS
from .criterion import of_model
from .short_training.context import ScoringContext

EVEN = 1 / 16  # of the largest gain: with so much for the head, early and late units count the same


@of_model(batches=16)
def depth_gain(context: ScoringContext) -> dict[str, float]:
    """`G_u * n_u^(1/4) * (16 G_head / max G)^d_u`: `adam_gain` with credit for depth, the more the head gains.

    `G_u` is the `adam_gain` of unit `u` and `n_u` the number of its weights, both divided by the largest; `d_u` is the
    share of the repeated layers before its block: 0 for embeddings, 1 for a head. `G_head` and `max G` are of blocks,
    whatever the units; several heads are added up. First order overrates early units, since all later layers bend what
    they do. The head tells by how much: it gains much where labels changed, which late units answer to, and little
    where inputs did. Where no head is scored, as when it is tied to the embeddings, `e^d_u` is in its place.

    Range: 0 to 16, or more for several heads, no unit. Cost: one forward and backward pass a batch, a gradient and two
    float32 numbers for each weight, and the outputs of the repeated layers; `memory="low"` changes nothing. Gradients
    alone: the best criterion without a training in benchmarks/criteria; 1/4 and 16 were chosen there, on classifiers
    of six layers.

    Raises:
        SurgicalError: a loss or a gradient that is NaN or infinite; no unit has a gradient.

    Source: ours. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="depth_gain")
    """
    context.keep(context.budget.affordable(len(context.batches), GRADIENTS, "the gradients of one batch"))
    gains, _ = gains_of_all(context)
    return by_depth(context, gains)


def by_depth(context: ScoringContext, gains: Mapping[str, float]) -> dict[str, float]:
    """`depth_gain` of units, given the `adam_gain` of each."""
    of_block: dict[str, float] = {}  # gains add up
    for name, gain in gains.items():
        of_block[context.blocks[name]] = of_block.get(context.blocks[name], 0.0) + gain
    head = sum(gain for block, gain in of_block.items() if kind_of(block) == "head")
    credit = head / max(of_block.values()) / EVEN if head else math.e
    sizes = {name: sum(weight.numel() for weight in context.units[name].values()) for name in gains}
    most, largest = max(gains.values()), max(sizes.values())
    depths = depths_of(context)
    return {
        name: gain / most * (sizes[name] / largest) ** 0.25 * credit ** depths[context.blocks[name]]
        for name, gain in gains.items()
    }


def depths_of(context: ScoringContext) -> dict[str, float]:
    """For each block the share of the repeated layers, 0 to 1, that stand before it in the block map."""
    before: dict[str, int] = {}
    layers = 0
    for block in dict.fromkeys(context.blocks.values()):
        before[block] = layers
        layers += kind_of(block) == "layer"
    return {block: count / max(1, layers) for block, count in before.items()}
