"""Rates that shrink with the distance from the output."""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks.block_map import BlockMap
from ..validation import check_number
from .policy import Policy


@dataclass(frozen=True)
class LayerDecay(Policy):
    """Layer-wise learning-rate decay: block `i` of `L` trains at `decay ** (L + 1 - i)` times the rate.

    Embeddings count as 0, the repeated blocks as 1 to L (an encoder's before its decoder's), the final norm and the
    head of a stack as one more than its last block, so the model's head has the full rate.

    Args:
        decay: factor from a block to the one below it, more than 0, at most 1. MAE uses 0.65 to 0.75 for ViTs.

    Source: the rule of ELECTRA, BEiT, MAE and timm (`param_groups_layer_decay`).

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policies.layer_decay(0.75)))
    """

    decay: float = 0.75

    def __post_init__(self) -> None:
        check_number("layer_decay", "decay", self.decay, above=0, at_most=1)

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        depth_of = blocks.depths
        top = max(depth_of.values())
        return {name: self.decay ** (top - depth) for name, depth in depth_of.items()}


def discriminative(factor: float = 2.6) -> LayerDecay:
    """Discriminative fine-tuning: each block trains at the rate of the block above it divided by `factor`.

    `eta^(l-1) = eta^l / factor`, with the full rate at the top. Depth counts as in `layer_decay`, whose rule this is
    with `decay = 1 / factor`; ULMFiT meant it for 4 layers, and 12 of them leave the first with 1 / 95,000.

    Args:
        factor: what to divide by from a block to the one below it, at least 1.

    Source: Howard and Ruder 2018, ULMFiT (arXiv 1801.06146): 2.6.

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policies.discriminative()))
    """
    check_number("discriminative", "factor", factor, "a finite number that rates are divided by", at_least=1)
    return LayerDecay(1 / factor)
