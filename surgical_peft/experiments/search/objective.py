"""The objective of a search: a recipe's metric on validation data after tuning the chosen blocks."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback

from ...atomic_files import finite
from ...auto import get_surgical_model
from ...errors import SurgicalError
from ...scoring.selection import Selection
from ...search.result import SOURCE_LOSS_RISE
from ...tuner.config import SurgicalConfig
from ...tuner.loading.fingerprint import fingerprint
from ..recipe.recipe import Recipe
from ..tasks.source_model import modules_to_save
from ..training.cost import Timing, measuring_seconds
from ..training.job_progress import part_of_job
from ..training.provenance import identity
from ..training.runner import Part, RecipeRunner
from ..training.source_data import MOST, SHIFTS, SourceData, source_recipe

Report = Callable[[float, int], None]


class RecipeObjective:
    """Trains a selection as a recipe says and gives its metric on validation data; the objective of `run_search`.

    All trainings of one objective share what they have in common: the data as the model takes them, the source
    model in memory, and what its frozen start computes. The test split is not even loaded.

    The metric comes from the split `validation`; with `folds` in the recipe from the part of `train` that a training
    was not given, and `seed` is the number of the fold.

    Attributes:
        recipe: as given.
        blocks: the map of the model, with `divide` in the recipe one of parts of its layers.
        rates, seeds: what to search over: the recipe's own where it has no list; for `run_search`.
        metric: its name.
        summary: what was understood of the data.
        settings: what a training is, in plain data; a study holds trainings of one kind.
        measured: what else is written down of each, the loss on which source data; a study holds it of the same.

    Raises:
        SurgicalError: model, data or the recipe's `folds` do not fit.

    Example:
        >>> objective = RecipeObjective(load_recipe("recipes/sweep_noise.yaml"))
        >>> run_search("sweep", objective, rates=objective.rates, seeds=objective.seeds)
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, began = recipe, time.perf_counter()
        self._runner = RecipeRunner(recipe, ("train",) if recipe.folds else ("train", "validation"))
        args = self._runner.args
        self.blocks = self._runner.blocks
        if recipe.divide:
            self.blocks = self.blocks.divided(recipe.divide)
            get_surgical_model(copy.deepcopy(self._runner.model), self._config(self._layers()))  # the parts exist
        count = len(self._runner.examples["train"])
        self._folds = folds_of(count, recipe.folds, args.seed) if recipe.folds else []
        self.rates = tuple(recipe.rates or [args.learning_rate])
        self.seeds = tuple(range(len(self._folds)) if recipe.folds else recipe.seeds or [args.seed])
        self.metric = self._runner.task.metric
        self.summary = self._runner.task.summary
        self._source = SourceData(recipe, MOST) if recipe.source_data is not None else None
        data = identity(recipe.data, recipe.data_config)
        self.settings = {
            **recipe.settings(),
            "model": f"{Path(recipe.model).name} {fingerprint(self._runner.model.state_dict().values())}",
            "data": f"{Path(recipe.data).name} {data['commit'] or data['fingerprint']}",
        }
        self.measured = {} if recipe.source_data is None else {"source_data": _identity(source_recipe(recipe))}
        self._load_seconds = time.perf_counter() - began

    def __call__(self, selection: Selection, rate: float, seed: int, report: Report | None = None) -> float:
        """The metric of `selection`, trained at `rate`; `report` is told it after every epoch but the last.

        Writes the number of tuned parameters, the peak memory in bytes, what was measured, and with `source_data` the
        rise of the loss there into `selection.record`.
        """
        measure, validation = self._runner.task.measure, self._validation(seed)
        policy = self.recipe.make_policy()
        changed: dict[str, Any] = {"seed": self._runner.args.seed if self._folds else seed, "learning_rate": rate}

        def reporter(wrapped: nn.Module) -> TrainerCallback:
            return _Reporter(report, lambda: measure(wrapped, validation)) if report else TrainerCallback()

        if self.recipe.is_online:
            wrapped, peak, metric = self._runner.adapt(self._wrap(selection), validation, policy, **changed)
        else:
            wrapped, peak = self._runner.train(self._wrap(selection), self._places(seed), policy, reporter, **changed)
            metric = measure(wrapped, validation)
        selection.record["tuned_parameters"] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        selection.record["peak_memory"] = peak
        selection.record["validation"] = {"metric": self.metric, "examples": len(validation)}
        if self._source is not None:
            selection.record[SOURCE_LOSS_RISE] = finite(self._source.loss(wrapped) - self._source_loss)
        return metric

    @cached_property
    def _source_loss(self) -> float:
        """Of the source model on its own data."""
        assert self._source is not None
        return self._source.loss(self._runner.model)

    def _wrap(self, selection: Selection) -> Callable[[nn.Module], nn.Module]:
        return lambda model: get_surgical_model(model, self._config(selection))

    def _config(self, selection: Selection) -> SurgicalConfig:
        keys = ("target_modules", "exclude_modules", "frozen_eval")
        given = {key: getattr(self.recipe, key) for key in keys}
        saved = modules_to_save(self.recipe, self._runner.model)
        return SurgicalConfig.from_selection(selection, **given, modules_to_save=saved)

    def timing(self) -> Timing:
        """The cost of one training, estimated from a few timed steps.

        Neither what a policy's probes cost nor pruning is in it.
        """
        seed, runner = self.seeds[0], self._runner
        measure, validation = runner.task.measure, self._validation(seed)
        measuring = measuring_seconds(measure, runner.model, validation)
        source = self._source
        on_source = 0.0 if source is None else measuring_seconds(source.loss, runner.model, source.sample)
        reports = math.ceil(runner.args.num_train_epochs) - 1 if self.recipe.pruner else 0
        places = self._places(seed)
        start = self._load_seconds + runner.reading(places)
        ends = [self._layers(), Selection(self.blocks.layers[-1:])]
        timed = []
        for place, end in enumerate(ends):
            with part_of_job(place / len(ends), (place + 1) / len(ends)):
                timed.append(runner.timed(self._wrap(end), places))
        (base, step, peak), (late_base, late_step, _) = timed
        steps, measuring = runner.steps(places), (1 + reports) * measuring + on_source
        late = late_base + steps * late_step + measuring
        return Timing(base + steps * step + measuring, late, step, measuring, start, peak)

    def _layers(self) -> Selection:
        """All repeated layers."""
        return Selection(self.blocks.layers)

    def _places(self, seed: int) -> list[int] | None:
        """The training examples of a training; None for all."""
        if not self._folds:
            return None
        return sorted(index for number, fold in enumerate(self._folds) if number != seed for index in fold)

    def _validation(self, seed: int) -> Part:
        return self._runner.part("train", self._folds[seed]) if self._folds else self._runner.part("validation")


def _identity(source: Recipe) -> dict[str, Any]:
    """Source data in plain data, the same wherever they lie."""
    known = identity(source.data, source.data_config)
    shift = {key: value for key in SHIFTS if (value := getattr(source, key))}
    return {**shift, "data": f"{Path(source.data).name} {known['commit'] or known['fingerprint']}"}


def folds_of(count: int, folds: int, seed: int) -> list[list[int]]:
    """The places 0 to `count` - 1 in `folds` parts of equal size, give or take one: each place in just one of them.

    Raises:
        SurgicalError: fewer than 2 folds, or more than there are examples.

    Example:
        >>> folds_of(5, 2, seed=0)
        [[2, 3, 4], [0, 1]]
    """
    if not 2 <= folds <= count:
        raise SurgicalError(f"folds={folds} does not fit {count} training examples: from 2 to {count}.")
    order = np.random.default_rng(seed).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, folds)]


class _Reporter(TrainerCallback):
    """Tells the metric after every epoch but the last, whose metric is that of the training."""

    def __init__(self, report: Report, measure: Callable[[], float]) -> None:
        self._report, self._measure = report, measure

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps:
            self._report(self._measure(), state.global_step)
