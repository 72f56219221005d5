"""The cost of advice before it is given, from a few timed steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...rendering import clock
from ...scoring.selection import Selection
from ..compare.comparison import FULL, Comparison
from ..training.runner import RecipeRunner
from .successive_halving import ROUNDS

CHOOSING = 0.5  # of a full fine-tuning, for `auto`


@dataclass(frozen=True)
class CostEstimate:
    """The cost of advice.

    Attributes:
        trainings: short ones, at most.
        full_trainings: how many full fine-tunings have as many steps, at most, choosing blocks included. Blocks near
            the output train faster.
        seconds_each: of one full fine-tuning; estimated from a few steps.
        seconds: of all steps, at most about; starting and measuring come on top, the more so the shorter they are.
    """

    trainings: int
    full_trainings: float
    seconds_each: float
    seconds: float

    def lines(self) -> list[str]:
        """The estimate in words."""
        return [
            f"{self.trainings} short trainings, at most with the steps of {self.full_trainings:.1f} full fine-tunings "
            f"of about {clock(self.seconds_each)}.",
            f"All: at most about {clock(self.seconds)}; starting and measuring come on top.",
        ]


def estimate(comparison: Comparison, runner: RecipeRunner) -> CostEstimate:
    """The cost of the short trainings of a comparison's methods; trains a few steps."""
    full = comparison.methods[FULL]
    seconds = runner.seconds(lambda model: full.wrap(model, Selection(()), comparison.recipe))
    count, share = 0, CHOOSING
    for stage in ROUNDS:
        methods = min(stage.methods or math.inf, len(comparison.methods) - 1)
        trainings = methods * min(stage.rates or math.inf, len(comparison.rates))
        count, share = count + int(trainings), share + trainings * stage.share
    return CostEstimate(count, share, seconds, share * seconds)
