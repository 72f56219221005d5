"""Nearness to the middle, the control that knows nothing but the order of the layers."""

from __future__ import annotations

from .criterion import of_model
from .depth import layers_of, of_layers
from .short_training.context import ScoringContext


@of_model(batches=0)
def middle(context: ScoringContext) -> dict[str, float]:
    """`1 - |2 i + 1 - n| / n` for layer `i` of the `n` of its stack, from 0: the nearer to the middle, the higher.

    Of two layers as near as each other `top_k` takes the earlier one first. Each stack has a middle: an encoder and
    its decoder, a vision tower and a language model, the stages of a hierarchical net. Only layers, and units in them,
    have a score; units of one layer have the same. Embeddings, final norms and heads stand outside of the stacks and
    have none.

    Range: 0 to 1, no unit. Cost: none, no data.

    Source: the middle layers, the control that wins in *Is One Layer Enough?*, Zhang et al. 2026 (arXiv 2607.01232):
    `k` layers from `floor(n/2 - k/2)` on, which are those that `top_k(scores, k)` takes of one stack.
    Known disagreement: none in the choice (the rule as a note on the paper has it); the paper ranks no layers by it.

    Example:
        >>> selection = top_k(score_blocks(model, None, criterion="middle"), 5)
    """
    stacks: dict[str, list[str]] = {}
    for layer in layers_of(context):
        stacks.setdefault(layer.rpartition(".")[0], []).append(layer)
    values = {
        layer: 1 - abs(2 * at + 1 - len(stack)) / len(stack)
        for stack in stacks.values()
        for at, layer in enumerate(stack)
    }
    return of_layers(context, values)
