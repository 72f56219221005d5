"""LISA: a few randomly drawn blocks at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..validation import check_cadence, check_choice, check_count
from .policy import STATE_POLICIES, Policy, TrainingState, check_enough


@dataclass(frozen=True)
class Lisa(Policy):
    """Every so many steps draw `num_blocks` of the repeated blocks at random and freeze the other ones.

    Embeddings, final norm and head (whatever is trained outside the repeated blocks) are always trained; on a large
    language model they are most of what is trained, so leave them out of `blocks` if memory is what you are after.

    Args:
        num_blocks: how many repeated blocks are trained at once.
        every: steps from draw to draw.
        seed: of the draws, which depend on nothing else but the step.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"keep"`; `"reset"` or `"offload"` save memory.

    Source: Pan et al. 2024 (arXiv 2403.17919): 2 blocks, 20 steps, state kept.

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy=policies.lisa()))
    """

    num_blocks: int = 2
    every: int = 20
    seed: int = 0
    hard: bool = True
    state_policy: str = "keep"

    def __post_init__(self) -> None:
        check_count("lisa", "num_blocks", self.num_blocks, "blocks trained at once")
        check_cadence("lisa", self.every)
        check_choice("lisa", "state_policy", self.state_policy, STATE_POLICIES)

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        if training.step % self.every:
            return None
        candidates = training.repeated
        check_enough("lisa", self.num_blocks, candidates)
        drawn = random.Random(f"{self.seed} {training.step // self.every}").sample(candidates, self.num_blocks)
        return training.only({*drawn, *(name for name in training.names if name not in candidates)})
