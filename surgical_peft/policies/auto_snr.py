"""Auto-SNR: what has too noisy a gradient is frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .. import criteria
from ..errors import SurgicalError
from ..scoring.block_scores import BlockScores, normalize
from ..validation import check_cadence, check_choice, check_count, check_number, resolve
from .policy import STATE_POLICIES, Policy, TrainingState


@dataclass(frozen=True)
class AutoSNR(Policy):
    """Train what scores at least `threshold`, freeze the rest until the next probe; the head is always trained.

    Needs `SurgicalCallback` among the Trainer's callbacks. If nothing reaches the threshold, the first probe is an
    error; at a later one the selection stays as it was.

    Args:
        threshold: the lowest score that is trained, after `normalized`.
        criterion: a name from `criteria`.
        granularity: `"tensor"` as in the paper's code, or `"block"`.
        every: score at the start of every `"epoch"`, or every so many steps.
        num_batches: how many batches to score on.
        normalized: `"max"` (divided by the largest), `"minmax"`, or None for raw scores. The head stays outside.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"keep"`, `"reset"` or `"offload"`.

    Source: Lee et al. 2022 (arXiv 2210.11466). The paper tunes the threshold; its grid and exact formula are not in
    the text that we could read, so the default is ours: tune it. Its released code is
    `auto_snr(0.95, criterion="eb", normalized=None)`: other statistics under the same name.

    Example:
        >>> optimizer = surgical_optimizer(args, policy=policies.auto_snr(0.1, granularity="block"))
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """

    threshold: float = 0.1
    criterion: str = "snr"
    granularity: str = "tensor"
    every: str | int = "epoch"
    num_batches: int = 5
    normalized: str | None = "max"
    hard: bool = True
    state_policy: str = "keep"

    def __post_init__(self) -> None:
        resolve(self.criterion, criteria)
        check_cadence("auto_snr", self.every, ("epoch",))
        check_choice("auto_snr", "granularity", self.granularity, ("block", "tensor"))
        check_choice("auto_snr", "normalized", self.normalized, ("max", "minmax", None))
        check_choice("auto_snr", "state_policy", self.state_policy, STATE_POLICIES)
        check_count("auto_snr", "num_batches", self.num_batches, "batches to score on")
        low, high = (0, 1) if self.normalized else (-math.inf, math.inf)
        check_number("auto_snr", "threshold", self.threshold, above=low, at_most=high)

    @property
    def probe_batches(self) -> int:
        return self.num_batches

    @property
    def probe_every(self) -> str | int:
        return self.every

    def multipliers_from(self, scores: BlockScores, training: TrainingState) -> dict[str, float] | None:
        inside = {
            unit.name: scores.values[unit.name]
            for unit in training.units
            if unit.name in scores.values and unit.block not in training.blocks.heads
        }
        if self.normalized:
            inside = normalize(inside, self.normalized)
        chosen = {name for name, value in inside.items() if value >= self.threshold}
        if not chosen:
            if training.state.get("chosen"):
                return None
            best = max(inside, key=inside.__getitem__, default=None)
            raise SurgicalError(
                f"threshold={self.threshold} freezes everything: "
                + (f"the highest {self.criterion} is {inside[best]:.4g} ({best})." if best else "nothing has a score.")
                + " Lower it."
            )
        training.state["chosen"] = True
        return {
            unit.name: float(unit.block in training.blocks.heads or unit.name in chosen) for unit in training.units
        }
