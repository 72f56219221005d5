"""Auto-RGN: every block at the rate that its relative gradient norm suggests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..criteria.rgn import relative_gradient_norms
from ..errors import SurgicalError
from ..scores import BlockScores, is_head, normalize
from .policy import Policy, Unit


def auto_rgn(every: str = "step", granularity: str = "block", normalized: str = "max", num_batches: int = 5) -> Policy:
    """Learning rates in proportion to the relative gradient norm `||g|| / ||theta||`, scaled to at most 1.

    The head keeps the full rate and stays outside the scaling, and so do units that are all zero: both have large
    ratios that say nothing about the shift. It saves neither memory nor backward time: all blocks have gradients.

    Args:
        every: `"step"` reads the gradients at hand before every optimizer step, at no extra pass; `"epoch"` scores on
            `num_batches` training batches at the start of every epoch, as the paper does, and needs
            `SurgicalCallback` among the Trainer's callbacks; where only parts of a block are tuned
            (`target_modules`), this scores the whole block, `"step"` the tuned parts.
        granularity: `"block"`, or `"tensor"` as in the paper's code.
        normalized: `"max"` (divided by the largest, the paper's code) or `"minmax"` (the paper's text: the smallest
            gets rate 0).
        num_batches: for `every="epoch"`: how many batches to score on.

    Source: Lee et al. 2022 (arXiv 2210.11466). Unlike its code, Adam's moments are kept from epoch to epoch.

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy=policies.auto_rgn()))
    """
    for name, value, known in (
        ("every", every, ("step", "epoch")),
        ("granularity", granularity, ("block", "tensor")),
        ("normalized", normalized, ("max", "minmax")),
    ):
        if value not in known:
            raise SurgicalError(f"{name}={value!r} is unknown to auto_rgn. There are: {', '.join(known)}.")
    if num_batches < 1:
        raise SurgicalError(f"num_batches={num_batches} is out of range: score on at least 1 batch.")
    probe_batches = num_batches if every == "epoch" else 0
    return AutoRGN(granularity=granularity, probe_batches=probe_batches, normalized=normalized)


@dataclass(frozen=True)
class AutoRGN(Policy):
    normalized: str = "max"

    def step_multipliers(self, units: Sequence[Unit]) -> dict[str, float] | None:
        if self.probe_batches:
            return None
        values = relative_gradient_norms([unit.parameters for unit in units])
        inside = {
            unit.name: value
            for unit, value in zip(units, values, strict=True)
            if not (is_head(unit.block) or math.isnan(value))
        }
        if not all(map(math.isfinite, inside.values())) or not any(inside.values()):
            return None  # a step that the gradient scaler will skip, or nothing to compare: rates stay as they are
        return {**{unit.name: 1.0 for unit in units}, **normalize(inside, self.normalized)}

    def multipliers_from(self, scores: BlockScores, units: Sequence[Unit]) -> dict[str, float]:
        names = [unit.name for unit in units if unit.name in scores.values and not is_head(unit.block)]
        inside = {name: scores.values[name] for name in names}
        return {**{unit.name: 1.0 for unit in units}, **normalize(inside, self.normalized)}
