"""Short trainings, judged on held-out batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import SurgicalError
from ..adam_gain import gains_of_all
from .context import ScoringContext

WORST = 1e6  # times the loss before: the loss of a training that diverged


def gains_and_loss(context: ScoringContext, least: int = 2) -> tuple[dict[str, float], float]:
    """The `adam_gain` of each unit that has a gradient, and the mean loss: by these, short trainings are paced.

    Raises:
        SurgicalError: fewer than `least` batches; a loss that is not above 0; a loss or a gradient that is NaN or
            infinite; no gradient at all.
    """
    if len(context.batches) < least:
        raise SurgicalError(
            "a short training is judged on held-out batches and needs at least 2, got 1: give a larger num_batches, "
            "or smaller batches."
        )
    gains, loss = gains_of_all(context)
    if not loss > 0:
        raise SurgicalError(
            f"the loss is {loss:.4g} on average, and short trainings are compared by the share of it that they take "
            "away: it must be above 0. Give another loss_fn, or a criterion on gradients: 'adam_gain'."
        )
    return gains, loss


@dataclass
class ShortRun:
    """Short trainings of some units together, one on every second batch and one on those between.

    They can be broken off and gone on with. Memory: the units' weights and Adam's numbers, on the CPU, for either
    training that is not at its end.

    Attributes:
        names: the units.
        rate: the first rate.
        passes: through its batches that a training makes; at their end the rate is 0.
    """

    names: tuple[str, ...]
    rate: float
    passes: int
    _done: int = 0
    _kept: dict[range, tuple[list[Tensor], dict[str, Any]]] = field(default_factory=dict)  # of either training

    def train(self, context: ScoringContext, until: int) -> float:
        """Go on to the end of the pass `until`; returns the mean loss, that of a batch by the training without it.

        The model is left as it was. The loss of a training that diverged may be NaN or infinite.
        """
        count = len(context.batches)
        one, other = range(0, count, 2), range(1, count, 2)
        losses = [len(held) * self._train_on(ats, context, until, held) for ats, held in ((one, other), (other, one))]
        self._done = until
        return sum(losses) / count

    def _train_on(self, ats: range, context: ScoringContext, until: int, held_out: range) -> float:
        with context.training(*self.names) as units:
            weights = [weight for unit in units.values() for weight in unit]
            optimizer = torch.optim.Adam(weights, lr=self.rate)
            if self._done:
                values, state = self._kept.pop(ats)
                optimizer.load_state_dict(state)
                with torch.no_grad():
                    for weight, value in zip(weights, values, strict=True):
                        weight.copy_(value)
            steps = range(self._done * len(ats), until * len(ats))
            context.steps(optimizer, ats, steps, self.rate, self.passes * len(ats))
            if until < self.passes:
                self._kept[ats] = [weight.detach().to("cpu", copy=True) for weight in weights], _on_cpu(optimizer)
            return context.mean_loss(held_out)


def log_loss_reduction(before: float, left: float) -> float:
    """`log(before / left)`, between -14 and 14: a training that diverged has left a million times as much."""
    if not math.isfinite(left):
        left = WORST * before
    return math.log(before / min(max(left, before / WORST), WORST * before))


def _on_cpu(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    state["state"] = {
        at: {name: value.to("cpu") for name, value in numbers.items()} for at, numbers in state["state"].items()
    }
    return state
