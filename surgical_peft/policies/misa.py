"""MISA: a small share of the weight matrices at a time, drawn by their gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SurgicalError
from ..validation import check_cadence, check_choice, check_number, immutable
from .gradient_norms import gradient_norms
from .grass import in_order_of_draws
from .policy import STATE_POLICIES, BlockSpec, Policy, TrainingState, check_enough, kept_on

BETA = 0.8  # of the moving mean
OLDEST = 2  # how many of those that were drawn longest ago are always drawn
HIGHEST = 5.0  # exponent


@dataclass(frozen=True)
class Misa(Policy):
    """Every so many steps draw weight matrices of the repeated blocks, by importance, up to a share of all weights.

    A module of the paper is one weight matrix, as in its code: each weight of two or more dimensions (stacked experts
    are one). Its importance `G` is the moving mean, over the intervals in which it was trained, of its mean gradient
    norm there: `m = 0.8 m + 0.2 mean ||g||`, `G = m / (1 - 0.8^n)` after `n` of them. Drawn are the two matrices that
    were drawn longest ago, then others, one by one, with a chance in proportion to `exp(min(5, eta G^2))`; each is
    taken if the share of what is drawn stays within `share`, else passed over. At first, matrices that were never
    drawn come first, in order, and every step draws anew until all were trained once.

    Biases and norms of the repeated blocks are frozen, and so is what is trained outside them unless `always` names
    it.

    Args:
        share: of all that may be trained, more than 0 and at most 1: so much is drawn at most, not counting `always`.
        every: steps from draw to draw.
        eta: how much importance counts, 0 upwards; 0 = all matrices have the same chance.
        always: blocks that are always trained, as `BlockMap.parse` takes them; default the head. `[]` = none.
        seed: of the draws.
        hard: freeze; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"reset"`, `"keep"` or `"offload"`.

    Source: MISA, Liu et al. 2025 (arXiv 2511.00056), Algorithm 1, and for all formulas and settings its code
    (`BlockCoordinateDesentOptimizer`). Three things differ. The code's moving mean starts each time from the corrected
    value, so that importance grows with the number of draws (2.8 times at the second), ours corrects as Adam does;
    its first means are divided by `every` though they are of one step; a matrix larger than the share is never
    drawn there, here it is an error. The head is trained here, there only one that is named `classifier`.

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy=policies.misa()))
    """

    share: float = 0.03
    every: int = 50
    eta: float = 1.0
    always: BlockSpec | None = None
    seed: int = 0
    hard: bool = True
    state_policy: str = "reset"

    granularity = "tensor"

    def __post_init__(self) -> None:
        check_number("misa", "share", self.share, "a share of the weights", above=0, at_most=1)
        check_cadence("misa", self.every)
        check_number("misa", "eta", self.eta, at_least=0)
        check_choice("misa", "state_policy", self.state_policy, STATE_POLICIES)
        object.__setattr__(self, "always", immutable(self.always))

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        step, state = training.step, training.state
        always = kept_on(training, self.always)
        sizes, room = self._sizes(training, always)
        last = state.setdefault("last", {})  # step of the last draw of each matrix
        if state.get("step", -1) >= step or (step % self.every and len(last) == len(sizes)):
            return None
        self._learn(training)
        importance = {name: mean / (1 - BETA**times) for name, (mean, times) in state.get("means", {}).items()}
        training.scores.update(importance)
        first = [name for name in sizes if name not in last]
        first += sorted((name for name in sizes if name in last), key=last.__getitem__)[: max(0, OLDEST - len(first))]
        weights = {name: math.exp(min(HIGHEST, self.eta * importance.get(name, 0.0) ** 2)) for name in sizes}
        others = {name: weight for name, weight in weights.items() if name not in first}
        drawn = []
        for name in [*first, *in_order_of_draws(others, random.Random(f"{self.seed} {step}"))]:
            if sizes[name] <= room:
                room -= sizes[name]
                drawn.append(name)
        last.update(dict.fromkeys(drawn, step))
        state.update(step=step, drawn=drawn)
        return {unit.name: float(unit.name in drawn or unit.block in always) for unit in training.units}

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        drawn = set(training.state["drawn"])
        measured = training.state.setdefault("measured", {})
        for name, norm in gradient_norms(unit for unit in training.units if unit.name in drawn).items():
            total, steps = measured.get(name, (0.0, 0))
            measured[name] = [total + norm, steps + 1]
        return None

    def _sizes(self, training: TrainingState, always: list[str]) -> tuple[Mapping[str, int], float]:
        """How many numbers each matrix that may be drawn has, and how many may be drawn."""
        layers = [name for name in training.repeated if name not in always]
        check_enough("misa", 1, layers)
        sizes = {
            unit.name: unit.size for unit in training.units if unit.block in layers and unit.parameters[0].ndim > 1
        }
        total = sum(unit.size for unit in training.units)
        if not sizes:
            raise SurgicalError(f"misa draws weight matrices, and {', '.join(layers)} have none that is trained.")
        largest = max(sizes, key=sizes.__getitem__)
        room = self.share * total * (1 + 1e-9)
        if sizes[largest] > room:
            enough = math.ceil(1000 * sizes[largest] / total) / 1000
            raise SurgicalError(
                f"share={self.share} of the {total:,} numbers that may be trained is less than {largest}, which has "
                f"{sizes[largest]:,} and would never be drawn: give misa a share of {enough:g} or more."
            )
        return sizes, room

    def _learn(self, training: TrainingState) -> None:
        """Take the gradient norms of the interval that ends into the moving means."""
        means = training.state.setdefault("means", {})
        for name, (total, steps) in training.state.pop("measured", {}).items():
            mean, times = means.get(name, (0.0, 0))
            means[name] = [BETA * mean + (1 - BETA) * total / steps, times + 1]
