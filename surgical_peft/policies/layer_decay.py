"""Rates that shrink with the distance from the output."""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from .policy import Policy, is_number


def layer_decay(decay: float = 0.75) -> Policy:
    """Layer-wise learning-rate decay: block `i` of `L` trains at `decay ** (L + 1 - i)` times the rate.

    Embeddings count as 0, the repeated blocks as 1 to L (an encoder's before its decoder's), the final norm and the
    head of a stack as one more than its last block, so the model's head has the full rate.

    Args:
        decay: factor from a block to the one below it, more than 0, at most 1. MAE uses 0.65 to 0.75 for ViTs.

    Source: the rule of ELECTRA, BEiT, MAE and timm (`param_groups_layer_decay`).

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policies.layer_decay(0.75)))
    """
    if not (is_number(decay) and 0 < decay <= 1):
        raise SurgicalError(f"decay={decay!r} is out of range: more than 0, at most 1.")
    return LayerDecay(decay=decay)


@dataclass(frozen=True)
class LayerDecay(Policy):
    decay: float = 0.75

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        depth_of = blocks.depths
        top = max(depth_of.values())
        return {name: self.decay ** (top - depth) for name, depth in depth_of.items()}
