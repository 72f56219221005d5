"""GRASS: a few blocks at a time, drawn by their gradients."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SurgicalError
from ..scoring.block_scores import BlockScores
from ..validation import check_cadence, check_choice, check_count, check_number
from .gradient_norms import gradient_norms
from .policy import STATE_POLICIES, Policy, TrainingState, check_enough


@dataclass(frozen=True)
class Grass(Policy):
    """LISA with a preference: every so many steps draw `num_blocks` repeated blocks by their mean gradient norm.

    The mean gradient norm of a block over `T` steps is `m = 1/T sum_t sqrt(||g_t||^2 / N)`, `N` the number of its
    weights. The first ones come from `num_batches` training batches, without an update, before the first step. A block
    is drawn with the probability `softmax(m / tau)` among those not drawn yet. Every `refresh` steps the blocks that
    were trained since then get `alpha * m_new + (1 - alpha) * m_old`, `m_new` over the steps in which they were
    trained; the others keep theirs. Embeddings, final norm and head (whatever is trained outside the repeated blocks)
    are always trained, as in `lisa`.

    It needs `SurgicalCallback` among the Trainer's callbacks, which scores the first batches; where only parts of a
    block are tuned (`target_modules`), these score the whole block, and later steps the tuned parts.

    Args:
        num_blocks: how many repeated blocks are trained at once.
        every: steps from draw to draw.
        refresh: steps from one update of the mean gradient norms to the next.
        num_batches: how many batches to score on before the first step.
        temperature: `tau` in units of the mean of `m` over the blocks, more than 0: the higher, the more evenly drawn.
        alpha: weight of the newest mean gradient norm, more than 0 and at most 1.
        seed: of the draws.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"offload"`, `"keep"` or `"reset"`.

    Source: GRASS, Tian et al. 2026 (arXiv 2604.07808), its formulas as a note on the paper has them; its code was not
    to be found. The paper's settings were neither: the numbers here are ours (LISA's where it has them), and so is the
    unit of the temperature, since gradient norms shrink with the size of a model, and that blocks outside the layers
    are trained. The paper moves the optimizer's state while it computes; here it moves at a draw.

    Example:
        >>> optimizer = surgical_optimizer(args, policy=policies.grass())
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """

    num_blocks: int = 2
    every: int = 20
    refresh: int = 20
    num_batches: int = 5
    temperature: float = 1.0
    alpha: float = 0.5
    seed: int = 0
    hard: bool = True
    state_policy: str = "offload"

    criterion = "grad_norm"

    def __post_init__(self) -> None:
        check_count("grass", "num_blocks", self.num_blocks, "blocks trained at once")
        check_cadence("grass", self.every)
        check_count("grass", "refresh", self.refresh, "steps")
        check_count("grass", "num_batches", self.num_batches, "batches to score on")
        check_number("grass", "temperature", self.temperature, above=0)
        check_number("grass", "alpha", self.alpha, "a weight", above=0, at_most=1)
        check_choice("grass", "state_policy", self.state_policy, STATE_POLICIES)

    @property
    def probe_batches(self) -> int:
        return self.num_batches

    @property
    def probe_every(self) -> str | int:
        return sys.maxsize  # before the first step only

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        check_enough("grass", self.num_blocks, training.repeated)
        if "norms" not in training.state:
            return None
        if training.step % self.refresh == 0:
            norms = training.state["norms"]
            for name, (total, steps) in training.state.pop("measured", {}).items():
                norms[name] = self.alpha * total / steps + (1 - self.alpha) * norms[name]
        return None if training.step % self.every else self._draw(training)

    def multipliers_from(self, scores: BlockScores, training: TrainingState) -> dict[str, float] | None:
        training.state["norms"] = {
            name: scores.values[name] / math.sqrt(scores.sizes[name]) if name in scores.values else 0.0
            for name in training.repeated
        }
        return self._draw(training)

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        if "drawn" not in training.state:
            raise SurgicalError(
                "grass draws blocks by the gradients of batches that are scored before the first step, and this "
                "training goes on from a later one without them: resume from a checkpoint that has the optimizer's "
                "state, or begin anew."
            )
        drawn = [unit for unit in training.units if unit.name in training.state["drawn"]]
        norms, measured = gradient_norms(drawn), training.state.setdefault("measured", {})
        for unit in drawn:
            if unit.name in norms:
                total, steps = measured.get(unit.name, (0.0, 0))
                measured[unit.name] = [total + norms[unit.name] / math.sqrt(unit.size), steps + 1]
        return None

    def _draw(self, training: TrainingState) -> dict[str, float]:
        norms = training.state["norms"]
        tau, most = self.temperature * sum(norms.values()) / len(norms), max(norms.values())
        weights = {name: math.exp((norm - most) / tau) if most else 1.0 for name, norm in norms.items()}
        chance = random.Random(f"{self.seed} {training.step}")
        training.state["drawn"] = in_order_of_draws(weights, chance)[: self.num_blocks]
        training.scores.clear()
        training.scores.update(norms)
        return training.only(
            {*training.state["drawn"], *(name for name in training.names if name not in training.repeated)}
        )


def in_order_of_draws(weights: Mapping[str, float], chance: random.Random) -> list[str]:
    """All names, drawn one by one without putting back, each with a chance in proportion to its weight."""
    left = dict(weights)
    order: list[str] = []
    while left:
        values = list(left.values()) if any(left.values()) else [1.0] * len(left)  # all too small to tell apart
        order += chance.choices(list(left), values)
        del left[order[-1]]
    return order
