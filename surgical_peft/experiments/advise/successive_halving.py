"""Short trainings of candidate methods, the better ones longer; and how much of a difference may be chance."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from ...errors import SurgicalError
from ...scoring.selection import Selection
from ..compare.methods import Method
from ..recipe.recipe import Recipe
from ..tasks.evaluation import Measure
from ..training.runner import RecipeRunner

GROUPS = 25  # of validation examples, each left out once
FEWEST = 12  # of them


@dataclass(frozen=True)
class Round:
    """One round of trainings.

    Attributes:
        share: of the recipe's steps that each takes.
        methods: how many of the best so far take part; None for all.
        rates: how many of each one's best rates; None for all.
    """

    share: float
    methods: int | None = None
    rates: int | None = None


# An eighth is too short: on the label map the head, which is the best in the end, has not begun to learn by then.
ROUNDS = (Round(1 / 4), Round(1 / 2, methods=3, rates=1))


@dataclass(frozen=True)
class ShortTraining:
    """One short training, or the model as it is, and how good it was on the validation examples.

    Attributes:
        rate: its learning rate; None where nothing was trained.
        share: of the recipe's steps.
        metric: of all validation examples.
        groups: what `ValidationJudge` read of each group of them.
        seconds: that it took, measuring included.
        source_loss_rise: of the loss on the source model's own data; None where that is not measured.
    """

    rate: float | None
    share: float
    metric: float
    groups: tuple[Any, ...]
    seconds: float
    source_loss_rise: float | None = None


@dataclass
class Candidate:
    """A method on trial.

    Attributes:
        name: as a recipe has it.
        method: what it is.
        selection: the blocks that it tunes, empty where it chooses none.
        tuned: number of parameters that it tunes.
        probes: those done, in their order.
        max_forgetting: what the loss on the source model's own data may rise by; None: anything.
    """

    name: str
    method: Method
    selection: Selection
    tuned: int
    probes: list[ShortTraining] = field(default_factory=list)
    max_forgetting: float | None = None

    @property
    def longest(self) -> list[ShortTraining]:
        """Its longest trainings, the best first; of equals the lower rate."""
        share = max(probe.share for probe in self.probes)
        tried = sorted((probe for probe in self.probes if probe.share == share), key=lambda probe: probe.rate or 0)
        return sorted(tried, key=self.merit, reverse=True)

    @property
    def best(self) -> ShortTraining:
        """The best of its longest trainings."""
        return self.longest[0]

    @property
    def keeps_limit(self) -> bool:
        """Whether the best one forgets no more than it may."""
        return self._is_within(self.best)

    def merit(self, probe: ShortTraining) -> tuple[bool, float]:
        """What trainings are ranked by: within the limit their metric, and after those how little others forget."""
        if self._is_within(probe):
            return True, ordered(probe.metric)
        return False, ordered(-_rise(probe))

    def _is_within(self, probe: ShortTraining) -> bool:
        return self.max_forgetting is None or _rise(probe) <= self.max_forgetting


def _rise(probe: ShortTraining) -> float:
    return math.nan if probe.source_loss_rise is None else probe.source_loss_rise


def best_of_all(candidates: Sequence[Candidate]) -> tuple[Candidate, ShortTraining]:
    """The candidate and the training with the best metric among the longest ones, however much it forgets."""
    share = max(probe.share for candidate in candidates for probe in candidate.probes)
    pairs = [(candidate, probe) for candidate in candidates for probe in candidate.probes if probe.share == share]
    return max(pairs, key=lambda pair: ordered(pair[1].metric))


def ordered(metric: float) -> float:
    """A metric to rank by: NaN is below all."""
    return -math.inf if math.isnan(metric) else metric


class ValidationJudge:
    """Measures models on the validation examples, and says how much of a difference may be chance.

    Args:
        runner: has the task, whose metric counts, and the examples.

    Raises:
        SurgicalError: there are too few examples to tell chance by.
    """

    def __init__(self, runner: RecipeRunner) -> None:
        self._measure, self._runner = runner.task.measure, runner
        size = len(runner.examples["validation"])
        if size < FEWEST:
            raise SurgicalError(
                f"there are {size} validation examples, too few to tell a difference from chance: that takes "
                f"{FEWEST} at least, and hundreds for a small one. Add some, or choose the blocks yourself."
            )
        places = random.Random(0).sample(range(size), size)  # they may be sorted by class
        count = min(GROUPS, size)
        self._groups = [sorted(places[start::count]) for start in range(count)]

    def read(self, model: nn.Module) -> tuple[Any, ...]:
        """The values that the metric is computed from, by group: predictions and references, or the group's metric."""
        measure, part = self._measure, partial(self._runner.part, "validation")
        if not isinstance(measure, Measure):
            return tuple(measure(model, part(group)) for group in self._groups)
        measure = replace(measure, compute=_both)
        everything: Any = measure(model, part())  # at once: most of a small measurement is its start
        if len(everything[1]) == len(part()):  # one for each example
            return tuple(tuple([side[index] for index in group] for side in everything) for group in self._groups)
        return tuple(measure(model, part(group)) for group in self._groups)

    def metric(self, groups: Sequence[Any]) -> float:
        """The metric of all that was read in these groups."""
        if not isinstance(self._measure, Measure):
            return statistics.fmean(groups)
        predictions, references = ([value for group in groups for value in group[side]] for side in (0, 1))
        return self._measure.compute(predictions, references)

    def constant(self, probe: ShortTraining) -> tuple[int, ShortTraining] | None:
        """The class that is the best answer for all examples, and how good it is; None where answers are no classes.

        Args:
            probe: any that was read; it has the right answers.
        """
        if not isinstance(self._measure, Measure) or not self._runner.task.names_labels:
            return None
        references = [group[1] for group in probe.groups]
        labels = sorted({label for group in references for label in group if isinstance(label, int)})
        if not labels or sum(map(len, references)) != len(self._runner.part("validation")):
            return None

        def always(label: int) -> ShortTraining:
            groups = tuple(([label] * len(group), group) for group in references)
            return ShortTraining(None, 0.0, self.metric(groups), groups, 0.0)

        best = max(labels, key=lambda label: ordered(always(label).metric))
        return best, always(best)

    def standard_error(self, one: ShortTraining, other: ShortTraining) -> float:
        """Of the difference between two metrics on the same examples, as it would be on other ones: the jackknife.

        Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 11; groups are left out, not
            examples, since not every task has one prediction an example.
        """
        count = len(self._groups)
        without = [self._without(one, at) - self._without(other, at) for at in range(count)]
        mean = statistics.fmean(without)
        return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without))

    def _without(self, probe: ShortTraining, at: int) -> float:
        return self.metric([*probe.groups[:at], *probe.groups[at + 1 :]])


def _both(predictions: list[Any], references: list[Any]) -> Any:
    return predictions, references


def halve(
    candidates: Sequence[Candidate],
    rates: Callable[[Candidate], Sequence[float]],
    runner: RecipeRunner,
    recipe: Recipe,
    judge: ValidationJudge,
    rounds: Sequence[Round] = ROUNDS,
    done: Callable[[], None] = lambda: None,
    rise: Callable[[nn.Module], float] | None = None,
) -> None:
    """Train all candidates for a few steps, the better ones for more, and so on; fills their `probes`.

    Where they may forget only so much, those that forget no more are the better ones; the best of all goes on with
    them, to tell what that costs.

    Args:
        candidates: those that train.
        rates: of each one's first round.
        runner: trains.
        recipe: of the trainings.
        judge: measures.
        rounds: what each round trains.
        done: called after each training.
        rise: of the loss of a trained model on source data; None: it is not measured.

    Source: successive halving, Jamieson and Talwalkar 2016 (arXiv 1502.07943).
    """

    def train(candidate: Candidate, rate: float, stage: Round) -> None:
        candidate.probes.append(_probe(candidate, rate, stage, runner, recipe, judge, rise))
        done()

    first, *others = rounds
    for candidate in candidates:
        for rate in rates(candidate):
            train(candidate, rate, first)
    for stage in others:
        ranked = sorted(candidates, key=lambda candidate: candidate.merit(candidate.best), reverse=True)
        longer = [
            (candidate, probe) for candidate in ranked[: stage.methods] for probe in candidate.longest[: stage.rates]
        ]
        if any(candidate.max_forgetting is not None for candidate in candidates):
            best = best_of_all(candidates)
            longer += [best] * all(best[1] is not probe for _, probe in longer)
        for candidate, probe in longer:
            assert probe.rate is not None
            train(candidate, probe.rate, stage)


def _probe(
    candidate: Candidate,
    rate: float,
    stage: Round,
    runner: RecipeRunner,
    recipe: Recipe,
    judge: ValidationJudge,
    rise: Callable[[nn.Module], float] | None,
) -> ShortTraining:
    began = time.perf_counter()
    steps = max(1, round(stage.share * runner.steps()))
    settings = {**candidate.method.training, "learning_rate": rate, "max_steps": steps}
    policy = candidate.method.policy(recipe.arguments(**settings))
    model, _ = runner.train(partial(_wrap, candidate, recipe), policy=policy, **settings)
    groups = judge.read(model)
    risen = None if rise is None else rise(model)
    return ShortTraining(rate, stage.share, judge.metric(groups), groups, time.perf_counter() - began, risen)


def decide(finalists: Sequence[Candidate], judge: ValidationJudge) -> tuple[Candidate, list[Candidate]]:
    """The candidate to recommend, and all that are as good as the best up to one standard error, itself among them.

    Args:
        finalists: trained for the same number of steps, or not at all.
        judge: of their differences.
    """
    best = max(finalists, key=lambda candidate: (ordered(candidate.best.metric), -candidate.tuned))
    behind = {candidate.name: best.best.metric - candidate.best.metric for candidate in finalists}
    tied = [
        candidate
        for candidate in finalists
        if candidate is best or behind[candidate.name] <= judge.standard_error(best.best, candidate.best)
    ]
    return min(tied, key=lambda candidate: (candidate.tuned, -ordered(candidate.best.metric))), tied


def _wrap(candidate: Candidate, recipe: Recipe, model: nn.Module) -> nn.Module:
    return candidate.method.wrap(model, candidate.selection, recipe)
