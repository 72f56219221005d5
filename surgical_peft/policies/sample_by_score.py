"""Random blocks, more and more those that were drawn before."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..validation import check_cadence, check_choice, check_count, check_number, immutable
from .gradient_norms import gradient_norms
from .policy import STATE_POLICIES, BlockSpec, Policy, TrainingState, check_enough, kept_on

_FADE = 0.95  # of epsilon from one draw to the next


@dataclass(frozen=True)
class SampleByScore(Policy):
    """Every so many steps draw `num_blocks` repeated blocks: by gradient norm at first, later by past draws.

    Draw `n` explores with the probability `epsilon * 0.95^n`: blocks are then drawn one by one with a chance in
    proportion to their gradient norm, as last seen; one not yet seen counts as much as the largest. Else shares are
    drawn from a Dirichlet distribution with `1 + times drawn` of each block, and the blocks with the largest shares
    are trained. Repeated blocks that are not drawn are frozen, and so is what is trained outside them unless `always`
    names it.

    Args:
        num_blocks: how many repeated blocks are trained at once.
        every: steps from draw to draw.
        epsilon: chance to explore at the first draw, from 0 to 1.
        always: blocks that are always trained, as `BlockMap.parse` takes them; default the head. `[]` = none.
        seed: of the draws.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"keep"`, `"reset"` or `"offload"`.

    Source: after the abstract of AdaGradSelect (Kumar et al. 2025, arXiv 2512.15764): Dirichlet sampling on past
    update counts with epsilon-greedy exploration, blocks chosen by their gradients. Its update rule and settings were
    not to be found; the numbers, the fading of epsilon and what exploring means here are ours.

    Example:
        >>> policy = policies.sample_by_score(num_blocks=3)
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy))
    """

    num_blocks: int = 2
    every: int = 20
    epsilon: float = 0.5
    always: BlockSpec | None = None
    seed: int = 0
    hard: bool = True
    state_policy: str = "keep"

    def __post_init__(self) -> None:
        check_count("sample_by_score", "num_blocks", self.num_blocks, "blocks trained at once")
        check_cadence("sample_by_score", self.every)
        check_number("sample_by_score", "epsilon", self.epsilon, "a chance", at_least=0, at_most=1)
        check_choice("sample_by_score", "state_policy", self.state_policy, STATE_POLICIES)
        object.__setattr__(self, "always", immutable(self.always))

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        draw = training.step // self.every
        if training.step % self.every or training.state.get("drawn", -1) >= draw:
            return None
        always = kept_on(training, self.always)
        candidates = [name for name in training.repeated if name not in always]
        check_enough("sample_by_score", self.num_blocks, candidates)
        counts = training.state.setdefault("counts", dict.fromkeys(candidates, 0))
        chance = random.Random(f"{self.seed} {draw}")
        if chance.random() < self.epsilon * _FADE**draw:
            norms = training.state.get("norms", {})
            unseen = max(norms.values(), default=0.0) or 1.0
            weights = {name: norms.get(name, unseen) for name in candidates}
            chosen = []
            for _ in range(self.num_blocks):
                chosen += chance.choices(list(weights), [weight + 1e-12 for weight in weights.values()])
                del weights[chosen[-1]]
        else:  # the shares of a Dirichlet draw are gamma draws divided by their sum, which changes no order
            shares = {name: chance.gammavariate(1 + counts[name], 1.0) for name in candidates}
            chosen = sorted(candidates, key=shares.__getitem__, reverse=True)[: self.num_blocks]
        for name in chosen:
            counts[name] += 1
        training.state["drawn"] = draw
        return training.only([*chosen, *always])

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        if (training.step + 1) % self.every == 0:  # the gradients before the next draw
            norms = gradient_norms(training.units)
            training.state.setdefault("norms", {}).update(norms)
            training.scores.update(norms)
        return None
