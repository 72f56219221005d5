"""AutoFreeze: blocks from the first upwards are frozen once they have settled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..validation import check_choice, check_count, check_number
from .policy import STATE_POLICIES, Policy, TrainingState


@dataclass(frozen=True)
class ProgressiveFreezing(Policy):
    """Freeze a growing prefix of the model: blocks whose gradient changes least from one interval to the next.

    Gradients are summed over an interval; `D_l` is the sum over a block's tensors of the 1-norm of that sum, and
    `eta_l = |D_l(before) - D_l(now)| / D_l(before)`. At the end of each interval from the second on, all blocks below
    the first one with `eta` at or above the percentile over the blocks still trained are frozen, for good. The final
    norm and the head are never frozen.

    Memory: one float32 number for every parameter still trained, given back as blocks are frozen.

    Args:
        interval: steps. The paper looks ten times in a training: give a tenth of its steps.
        percentile: from 0 to 100; 50 = the median.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"reset"` (dropped), `"keep"` or `"offload"`.

    Source: Liu et al. 2021, AutoFreeze (arXiv 2102.01386), from its code. It makes a new optimizer at each change;
    ours keeps the state of the blocks that go on. Gradients are those that the optimizer sees, after clipping.

    Example:
        >>> policy = policies.progressive_freezing(interval=50)
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy))
    """

    interval: int = 100
    percentile: float = 50
    hard: bool = True
    state_policy: str = "reset"

    def __post_init__(self) -> None:
        check_count("progressive_freezing", "interval", self.interval, "steps")
        check_number("progressive_freezing", "percentile", self.percentile, at_least=0, at_most=100)
        check_choice("progressive_freezing", "state_policy", self.state_policy, STATE_POLICIES)

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        if training.step % self.interval:
            return None
        frozen = training.state.get("frozen", [])
        return training.only([name for name in training.names if name not in frozen])

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        depth_of = training.blocks.depths
        top = max(depth_of.values())
        sums = training.state.setdefault("sums", {})
        frozen = training.state.setdefault("frozen", [])
        active = [unit for unit in training.units if unit.name not in frozen and depth_of[unit.block] < top]
        for unit in active:
            totals = sums.get(unit.name) or [torch.zeros_like(p, dtype=torch.float32) for p in unit.parameters]
            for at, p in enumerate(unit.parameters):
                totals[at] = totals[at].detach().to(p.device)  # a checkpoint is read to the CPU
                if p.grad is not None:
                    totals[at] += p.grad
            sums[unit.name] = totals
        if active and (training.step + 1) % self.interval == 0:
            norms = [torch.stack([total.abs().sum() for total in sums.pop(unit.name)]).sum() for unit in active]
            values = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
            current = dict(zip((unit.name for unit in active), values, strict=True))
            if before := training.state.get("before"):
                changes = {name: abs(before[name] - value) / (before[name] or 1.0) for name, value in current.items()}
                training.scores.update(changes)
                frozen += settled(changes, self.percentile)
            training.state["before"] = {name: value for name, value in current.items() if name not in frozen}
        return None  # frozen from the next step on, see `plan`


def settled(changes: dict[str, float], percentile: float) -> list[str]:
    """The blocks before the first one whose change is at or above the percentile of all."""
    bound = np.percentile(list(changes.values()), percentile)
    if not np.isfinite(bound):  # a gradient was not: nothing is known of what still changes
        return []
    names = list(changes)
    return names[: next(at for at, name in enumerate(names) if changes[name] >= bound)]
