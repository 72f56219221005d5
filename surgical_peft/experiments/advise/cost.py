"""The cost of advice before it is given, from a few timed steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...rendering import clock
from ..compare.comparison import Comparison
from ..compare.cost import time_trainings
from ..training.cost import Timing, measuring_seconds, memory_in_words, time_in_words
from ..training.runner import RecipeRunner
from ..training.source_data import SourceData
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
        seconds: of all, at most about, choosing, starting and measuring included.
        memory: bytes that it takes at most.
    """

    trainings: int
    full_trainings: float
    seconds_each: float
    seconds: float
    memory: int

    def lines(self) -> list[str]:
        """The estimate in words."""
        return [
            f"{self.trainings} short trainings, at most with the steps of {self.full_trainings:.1f} full fine-tunings "
            f"of about {clock(self.seconds_each)}.",
            time_in_words(self.seconds, 1, is_bound=True),
            memory_in_words(self.memory, 1),
        ]


def estimate(
    comparison: Comparison,
    runner: RecipeRunner,
    timing: Timing | None = None,
    source: SourceData | None = None,
    is_limited: bool = False,
) -> CostEstimate:
    """The cost of the short trainings of a comparison's methods; trains a few steps, unless a `timing` is given.

    Args:
        comparison: has the methods and rates.
        runner: trains.
        timing: of a training.
        source: what each is measured on besides.
        is_limited: whether each later round has a training more, the best of all, see `halve`.
    """
    timing = timing or time_trainings(comparison.recipe, runner)
    on_source = 0.0 if source is None else measuring_seconds(source.loss, runner.model, source.sample)
    count, share = 0, CHOOSING
    for stage in ROUNDS:
        methods = min(stage.methods or math.inf, len(comparison.methods) - 1)
        trainings = methods * min(stage.rates or math.inf, len(comparison.rates))
        trainings += is_limited and stage is not ROUNDS[0]
        count, share = count + int(trainings), share + trainings * stage.share
    steps = runner.steps() * timing.step
    each = timing.whole - steps + on_source  # starting and measuring
    return CostEstimate(count, share, timing.whole, timing.start + share * steps + count * each, timing.memory)
