"""ULMFiT's discriminative rates."""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from .policy import Policy, is_number


def discriminative(factor: float = 2.6) -> Policy:
    """Discriminative fine-tuning: each block trains at the rate of the block above it divided by `factor`.

    `eta^(l-1) = eta^l / factor`, with the full rate at the top. Depth counts as in `layer_decay`, whose rule this is
    with `decay = 1 / factor`; ULMFiT meant it for 4 layers, and 12 of them leave the first with 1 / 95,000.

    Args:
        factor: what to divide by from a block to the one below it, at least 1.

    Source: Howard and Ruder 2018, ULMFiT (arXiv 1801.06146): 2.6.

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policies.discriminative()))
    """
    if not (is_number(factor) and factor >= 1):
        raise SurgicalError(f"factor={factor!r} is out of range: a number from 1 upwards that rates are divided by.")
    return Discriminative(factor=factor)


@dataclass(frozen=True)
class Discriminative(Policy):
    factor: float = 2.6

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        depth_of = blocks.depths
        top = max(depth_of.values())
        return {name: self.factor ** (depth - top) for name, depth in depth_of.items()}
