"""Auto-SNR: what has too noisy a gradient is frozen."""

from __future__ import annotations

from dataclasses import dataclass

from .. import criteria
from ..errors import SurgicalError
from ..scoring.block_scores import BlockScores, normalize
from ..validation import resolve
from .policy import STATE_POLICIES, Policy, TrainingState, check_cadence, check_count, check_word, is_number


def auto_snr(
    threshold: float = 0.1,
    criterion: str = "snr",
    granularity: str = "tensor",
    every: str | int = "epoch",
    num_batches: int = 5,
    normalized: str | None = "max",
    hard: bool = True,
    state_policy: str = "keep",
) -> Policy:
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

    Source: Lee et al. 2022 (arXiv 2210.11466). The paper tunes the threshold; its grid and exact formula were not to
    be found in what we could read, so the default is ours: tune it. Its released code is
    `auto_snr(0.95, criterion="eb", normalized=None)`: other statistics under the same name.

    Example:
        >>> optimizer = surgical_optimizer(args, policy=policies.auto_snr(0.1, granularity="block"))
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """
    resolve(criterion, criteria)
    check_cadence("auto_snr", every, ("epoch",))
    check_word("auto_snr", "granularity", granularity, ("block", "tensor"))
    check_word("auto_snr", "normalized", normalized, ("max", "minmax", None))
    check_word("auto_snr", "state_policy", state_policy, STATE_POLICIES)
    check_count("auto_snr", "num_batches", num_batches, "batches to score on")
    if not is_number(threshold) or (normalized and not 0 < threshold <= 1):
        raise SurgicalError(
            f"threshold={threshold!r} is out of range: "
            + (f"normalized={normalized!r} scores lie between 0 and 1." if normalized else "a finite number.")
        )
    return AutoSNR(
        granularity=granularity,
        probe_batches=num_batches,
        probe_every=every,
        criterion=criterion,
        hard=hard,
        state_policy=state_policy,
        threshold=threshold,
        normalized=normalized,
    )


@dataclass(frozen=True)
class AutoSNR(Policy):
    threshold: float = 0.0
    normalized: str | None = "max"

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
                + (f"the highest {self.criterion} is {inside[best]:.4g} ({best})." if best else "nothing is scored.")
                + " Lower it."
            )
        training.state["chosen"] = True
        return {
            unit.name: float(unit.block in training.blocks.heads or unit.name in chosen) for unit in training.units
        }
