"""Depth, the control that knows nothing but the order of the layers."""

from __future__ import annotations

from ..blocks.block_map import kind_of
from ..validation import check_choice
from .criterion import of_model
from .short_training.context import ScoringContext

ENDS = ("output", "input")


@of_model(batches=0)
def depth(context: ScoringContext, *, end: str = "output") -> dict[str, float]:
    """`(i + 1) / n` for layer `i` of `n`, counted from 0: the nearer to the output, the higher.

    `end="input"` counts from the other end. Layers count through all stacks in the order in which they run, an
    encoder's before its decoder's. Only layers, and units in them, have a score; units of one layer have the same.
    Embeddings, final norms and heads have none: whether these are tuned is no question of depth.

    Range: 0 to 1, no unit. Cost: none, no data.

    Source: the last layers, as fine-tuning by hand has them, or the first: the control that costs nothing.
    Known disagreement: none.

    Raises:
        SurgicalError: an `end` that is neither.

    Example:
        >>> from functools import partial
        >>> scores = score_blocks(model, None, criterion=partial(criteria.depth, end="input"))
    """
    check_choice("depth", "end", end, ENDS)
    layers = layers_of(context)[:: 1 if end == "output" else -1]
    return of_layers(context, {layer: (at + 1) / len(layers) for at, layer in enumerate(layers)})


def layers_of(context: ScoringContext) -> list[str]:
    """The blocks that are repeated layers, in the map's order."""
    return [block for block in dict.fromkeys(context.blocks.values()) if kind_of(block) == "layer"]


def of_layers(context: ScoringContext, values: dict[str, float]) -> dict[str, float]:
    """For each unit the value of its layer; units of other blocks are left out."""
    return {name: values[context.blocks[name]] for name in context.units if context.blocks[name] in values}
