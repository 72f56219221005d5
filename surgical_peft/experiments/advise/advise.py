"""`surgical-peft advise`: recommends a way of tuning for a recipe's data after short trainings, surgical or not."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from ...atomic_files import check_replaceable, whole_folder
from ...auto import CRITERION
from ...errors import SurgicalError
from ...rendering import clock
from ...scoring.progress import Stages
from ..compare.comparison import Comparison
from ..recipe.recipe import Recipe
from ..tasks import Examples
from ..training.job_progress import telling
from ..training.provenance import machine, today, versions
from ..training.runner import RecipeRunner
from ..training.source_data import MOST, SourceData
from ..training.train import loader
from .advice import Advice, ConstantReport, CostReport, Recommendation, ScoreReport
from .candidates import CANDIDATES, find_candidates, measure_untrained
from .cost import CostEstimate, estimate
from .forgetting import check_limit, forgetting_report
from .plot import plot
from .report import markdown, sentences
from .rows import lines_of, row_of, signature_report, twin_of
from .shift_signature import EXAMPLES, FEWEST, Batches, Signature, signature
from .successive_halving import ROUNDS, Candidate, ShortTraining, ValidationJudge, decide, halve, ordered

_MOST_RATES = 3
_TEXT = "advice.md"  # by which earlier advice is known
_BATCH = 64  # of the signature


def plan(recipe: Recipe, *, max_forgetting: float | None = None, console: Console | None = None) -> CostEstimate:
    """Estimate the cost of advice on a recipe; trains a few steps to tell the time, and keeps nothing.

    Raises:
        SurgicalError: as `advise`.

    Example:
        >>> plan(load_recipe("recipes/fashion_mnist_noise.yaml")).trainings
        24
    """
    check_limit(recipe, max_forgetting)
    comparison = comparison_of(recipe)
    with Stages(console) as stages:
        stages.begin("load model and data")
        source = SourceData(recipe, MOST) if recipe.source_data is not None else None
        runner = RecipeRunner(comparison.recipe)
        ValidationJudge(runner)  # says so if there is too little to judge by
        stages.begin("time a few steps", 1.0)
        with telling(stages.advance):
            return estimate(comparison, runner, source=source, is_limited=max_forgetting is not None)


def advise(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    max_forgetting: float | None = None,
    console: Console | None = None,
) -> Advice:
    """Try a few ways of tuning for a few steps each, and say which one to use, with the evidence.

    Every candidate that fits the model is trained for a quarter of the recipe's steps at several rates, the best three
    for a half, each at its best rate (successive halving), all judged by the recipe's metric on validation data. Of
    those that are as good as the best, up to one standard error of the difference, the one that tunes the fewest
    parameters is recommended (the one-standard-error rule of Breiman et al. 1984, "Classification and Regression
    Trees"); that may be full fine-tuning, or the model as it is. The scores of the blocks and the signature of the
    shift are evidence beside it, and decide nothing. Random states are left as trainings leave them.

    Args:
        recipe: its `rates`, or else a grid around its `learning_rate`, its training arguments and metric are used;
            with `source_data` the signature says how far features move, and each training by how much the loss on
            these data rises. `blocks`, `policy` and `methods` are not read.
        output: folder to write to; default is the recipe's `output_dir`. It gets `advice/`, with `advice.json`,
            `advice.md` and `signature.png`.
        max_forgetting: what the mean loss on `source_data` may rise by, in its own unit: nats for classes and tokens,
            squared units for numbers. Only candidates that keep this after the short trainings are recommended, and
            the advice says what that costs, or that none keeps it.
        console: where to show progress; default is the terminal.

    Returns:
        The advice; `advice.json` holds it.

    Raises:
        SurgicalError: data, splits or rates that are missing or do not fit, or `max_forgetting` without `source_data`,
            before any training; no training gave a number.

    Example:
        >>> advise(load_recipe("recipes/fashion_mnist_label_map.yaml")).recommended.lines
        {'blocks': ['head'], 'learning_rate': 0.01}
    """
    began = time.perf_counter()
    recipe.check_run(output)
    check_limit(recipe, max_forgetting)
    comparison = comparison_of(recipe)
    folder = Path(str(output or recipe.arguments().output_dir)) / "advice"
    check_replaceable(folder, _TEXT)
    with Stages(console or Console()) as stages:
        stages.begin("load model and data")
        source = SourceData(recipe, MOST) if recipe.source_data is not None else None
        runner = RecipeRunner(comparison.recipe)
        stages.end()
        runner.task.summary.show(stages.console)
        judge = ValidationJudge(runner)
        stages.begin("time a few steps", 1.0)
        with telling(stages.advance):
            cost = estimate(comparison, runner, source=source, is_limited=max_forgetting is not None)
        trial = _Trial(comparison, runner, judge, cost, source, max_forgetting)
        for line in trial.cost.lines():
            stages.say(line)
        stages.begin("signature of the shift")
        signature = _signature(runner, None if source is None else source.examples)
        trial.train(stages)
    advice = trial.advice(recipe, signature, began)
    with whole_folder(folder, _TEXT) as temporary:
        (temporary / "advice.json").write_text(json.dumps(advice.to_json(), indent=2) + "\n", encoding="utf-8")
        (temporary / _TEXT).write_text(markdown(advice), encoding="utf-8")
        plot(advice, temporary / "signature.png")
    return advice


class _Trial:
    """The candidates, their short trainings, and the one to recommend."""

    def __init__(
        self,
        comparison: Comparison,
        runner: RecipeRunner,
        judge: ValidationJudge,
        cost: CostEstimate,
        source: SourceData | None,
        max_forgetting: float | None,
    ) -> None:
        self.comparison, self.runner, self.judge, self.cost = comparison, runner, judge, cost
        self.source, self.max_forgetting = source, max_forgetting

    def train(self, stages: Stages) -> None:
        """Choose the blocks of the candidates and train them, the better ones longer."""
        comparison, runner, judge = self.comparison, self.runner, self.judge
        stages.begin("choose blocks")
        self.candidates, self.unfit = find_candidates(comparison, runner)
        for candidate in self.candidates.values():
            candidate.max_forgetting = self.max_forgetting
        measure_untrained(self.candidates["nothing"], runner, judge)
        self.trained = [
            candidate
            for candidate in self.candidates.values()
            if candidate.method.is_trained and not twin_of(candidate, self.candidates)
        ]

        def rates(candidate: Candidate) -> Sequence[float]:
            return comparison.grid(candidate.method.title)

        stages.begin("short trainings", self.cost.trainings, is_bound=True)
        halve(self.trained, rates, runner, comparison.recipe, judge, done=stages.advance, rise=self._rise())
        seconds = sum(probe.seconds for candidate in self.trained for probe in candidate.probes)
        stages.say(f"{sum(len(c.probes) for c in self.trained)} short trainings took {clock(seconds)}")

    def _rise(self) -> Callable[[nn.Module], float] | None:
        """The rise of the source loss of a trained model, where there are source data."""
        source = self.source
        if source is None:
            return None
        before = source.loss(self.runner.model)
        return lambda model: source.loss(model) - before

    def advice(self, recipe: Recipe, signature: Signature, began: float) -> Advice:
        """The advice that follows from the trainings.

        Raises:
            SurgicalError: none of them gave a number.
        """
        runner, judge, candidates = self.runner, self.judge, self.candidates
        trained = [candidate for candidate in self.trained if candidate.best.share == ROUNDS[-1].share]
        none_fits, finalists = not any(candidate.keeps_limit for candidate in trained), list(trained)
        if not recipe.new_head:  # which nobody has trained
            finalists.insert(0, candidates["nothing"])
        rivals = [candidate for candidate in finalists if none_fits or candidate.keeps_limit]
        chosen, tied = decide(rivals, judge)
        constant = judge.constant(candidates["nothing"].best)
        has_learned = constant is None or any(_beats(each.best, constant[1], judge) for each in rivals)
        is_sure = has_learned and not none_fits
        if math.isnan(chosen.best.metric):
            rates = self.comparison.rates
            raise SurgicalError(f"no training gave a number for {runner.task.metric}: lower the rates, {rates}.")
        best = max(tied, key=lambda candidate: ordered(candidate.best.metric))
        scores = candidates["auto"].selection.record.get("scores", {}) if "auto" in candidates else {}
        seconds = time.perf_counter() - began
        advice = Advice(
            date=today(),
            versions=versions(),
            machine=machine(),
            recipe=recipe.keys(),
            metric=runner.task.metric,
            validation_examples=len(runner.examples["validation"]),
            share=ROUNDS[-1].share,
            surgery=is_sure and chosen.method.choose is not None,
            recommended=self._recommendation(chosen, recipe) if is_sure else None,
            tied=[candidate.name for candidate in tied],
            all_tied=len(tied) == len(finalists),
            unfit=self.unfit,
            methods=[row_of(candidate, candidates, finalists, best, judge) for candidate in candidates.values()],
            scores=ScoreReport(CRITERION, scores),
            signature=signature_report(signature),
            cost=CostReport(
                trainings=sum(len(candidate.probes) for candidate in self.trained),
                planned=self.cost.full_trainings,
                full_trainings=seconds / self.cost.seconds_each,
                seconds_each=self.cost.seconds_each,
                seconds=round(seconds, 1),
            ),
            constant=constant and ConstantReport(self._name_of(constant[0]), constant[1].metric),
            source_examples=None if self.source is None else len(self.source.sample),
            forgetting=None
            if self.max_forgetting is None
            else forgetting_report(trained, chosen if is_sure else None, self.max_forgetting, judge),
        )
        return replace(advice, sentences=sentences(advice))

    def _name_of(self, label: int) -> str:
        config: Any = self.runner.model.config
        return repr((config.id2label or {}).get(label, label))

    def _recommendation(self, chosen: Candidate, recipe: Recipe) -> Recommendation:
        return Recommendation(
            method=chosen.name,
            title=chosen.method.title,
            blocks=list(chosen.selection.blocks),
            tuned_parameters=chosen.tuned,
            all_parameters=sum(weight.numel() for weight in self.runner.model.parameters()),
            lines=lines_of(chosen, recipe),
        )


def _beats(probe: ShortTraining, constant: ShortTraining, judge: ValidationJudge) -> bool:
    """Whether it is better than a constant answer by more than one standard error."""
    return probe.metric - constant.metric > judge.standard_error(probe, constant)


def comparison_of(recipe: Recipe) -> Comparison:
    """The candidates, on the recipe's own model, data and seed."""
    if recipe.is_online:
        raise SurgicalError(
            "unlabelled: online: advise judges short trainings on labeled images, and a stream has neither: use "
            "compare, or unlabelled: true."
        )
    rates = sorted(map(float, recipe.rates or ()))
    if not rates:
        middle = recipe.arguments().learning_rate
        rates = [float(f"{middle * factor:.3g}") for factor in (1 / 3, 1, 3)]
    if len(rates) > _MOST_RATES:
        rates = [rates[0], rates[len(rates) // 2], rates[-1]]
    alone: dict[str, Any] = {"sources": None, "seeds": None, "rate_seeds": None, "draws": None, "test_data": None}
    comparison = Comparison(replace(recipe, methods=list(CANDIDATES), rates=rates, **alone))
    return comparison


def _signature(runner: RecipeRunner, source: Examples | None) -> Signature:
    train = runner.examples["validation" if runner.recipe.unlabelled else "train"]  # images as they are, not copies
    size = min(EXAMPLES, len(train), EXAMPLES if source is None else len(source) // 2)
    if size < FEWEST:
        size, source = min(EXAMPLES, len(train)), None

    def batches(examples: Any, places: Sequence[int]) -> Batches:
        chunks = [places[start : start + _BATCH] for start in range(0, len(places), _BATCH)]
        return [runner.task.collate([examples[index] for index in chunk]) for chunk in chunks]

    halves: tuple[Batches, Batches] | None = None
    if source is not None:
        places = random.Random(0).sample(range(len(source)), 2 * size)
        halves = batches(source, places[:size]), batches(source, places[size:])
    target = batches(train, random.Random(0).sample(range(len(train)), size))
    return signature(runner.model, target, halves, loader(runner.task, runner.args))
