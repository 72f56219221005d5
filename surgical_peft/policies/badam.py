"""BAdam: one block after the other."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..validation import check_cadence, check_choice, immutable
from .policy import STATE_POLICIES, BlockSpec, Policy, TrainingState, check_enough, kept_on


@dataclass(frozen=True)
class Badam(Policy):
    """Block coordinate descent: train one repeated block for `every` steps, then the next, round after round.

    What is trained outside the repeated blocks is frozen unless `always` names it: the paper's default too, but for
    the head, which is new in most fine-tunings and so is always trained.

    Args:
        every: steps on one block. The paper takes `n / (batch size x blocks)` for `n` examples, at least 50 and at
            most 100.
        order: `"random"` (shuffled anew each round), `"ascending"` or `"descending"`.
        always: blocks that are always trained, as `BlockMap.parse` takes them; default the head. `[]` = none.
        seed: of the shuffling, which depends on nothing else but the step.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"reset"` (dropped at a switch), `"keep"` or
            `"offload"`.

    Source: Luo et al. 2024 (arXiv 2404.02827). Its code drops the state of all parameters at a switch, ours that of
    the block that is left; what is always trained keeps its state.

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy=policies.badam(every=50)))
    """

    every: int = 100
    order: str = "random"
    always: BlockSpec | None = None
    seed: int = 0
    hard: bool = True
    state_policy: str = "reset"

    def __post_init__(self) -> None:
        check_cadence("badam", self.every)
        check_choice("badam", "order", self.order, ("random", "ascending", "descending"))
        check_choice("badam", "state_policy", self.state_policy, STATE_POLICIES)
        object.__setattr__(self, "always", immutable(self.always))

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        if training.step % self.every:
            return None
        always = kept_on(training, self.always)
        turns = [name for name in training.repeated if name not in always]
        check_enough("badam", 1, turns)
        cycle, at = divmod(training.step // self.every, len(turns))
        if self.order == "random":
            random.Random(f"{self.seed} {cycle}").shuffle(turns)
        elif self.order == "descending":
            turns.reverse()
        return training.only([turns[at], *always])
