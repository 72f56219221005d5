"""Check of a comparison before anything is chosen or trained: all that does not fit is told at once."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import SurgicalError
from ...optim.optimizer import surgical_optimizer
from ...scoring.selection import Selection
from ...tuner.loading.fingerprint import each_read_once, fingerprint
from ..recipe.recipe import Recipe
from ..tasks import further_measure
from ..tasks.unlabelled import check_policy
from ..training.runner import ROOM, RecipeRunner
from ..training.train import loader
from ..training.workers import WorkerPool
from .comparison import Comparison, Job
from .loaded import LoadedData, make_examples
from .methods import MethodContext


def check(comparison: Comparison, data: LoadedData, pool: WorkerPool) -> None:
    """Find out what does not fit, before anything is chosen or trained.

    Each method says whether it fits each source model; then all data are opened, and every example that will be used
    is made once, since a single bad image of a test split would end everything after all trainings.

    Args:
        comparison: to check.
        data: to load by.
        pool: makes the examples.

    Raises:
        SurgicalError: data or splits that are missing, or do not fit the task or a source model; methods that do not
            fit, all of them; an example that cannot be made. What else data libraries raise goes through.
    """
    misfits: dict[str, str] = {}
    for job in reversed(comparison.firsts):  # what the first jobs need stays in memory
        misfits = {**misfits_of(comparison, job, data.runner(job)), **misfits}
    _refuse(misfits, len(comparison.methods))
    for metric in comparison.recipe.test_metrics:
        further_measure(comparison.test_recipes(0, comparison.seeds[0])[0], metric)
    if data.made:
        data.forget()  # what reads the examples that are made now is opened after them
    pool.run("read data", make_examples, _all_data(comparison, data))


def context_of(comparison: Comparison, job: Job, runner: RecipeRunner, folder: Path) -> MethodContext:
    """What a method may look at to choose its blocks.

    Args:
        comparison: has the recipe of the job.
        job: says which source model, and the seed.
        runner: has the model and the data of both; perhaps made for another seed with the same.
        folder: for the method's own files.
    """
    recipe = comparison.recipe_of(job.source, job.seed)
    return MethodContext(
        recipe=recipe,
        model=runner.model,
        blocks=runner.blocks,
        batches=partial(loader, runner.task, recipe.arguments()),
        seed=job.seed,
        folder=folder,
    )


def misfit_message(title: str, model: nn.Module, error: ValueError, source: str | None = None) -> str:
    """That a method does not fit a model, and why; `source` says which of several source models it is."""
    name = type(model).__name__ + (f" of {source}" if source else "")
    return f"{title} does not fit {name}: {error}"


def misfits_of(comparison: Comparison, job: Job, runner: RecipeRunner) -> dict[str, str]:
    """What is wrong with each method that does not fit a source model, by title; costs neither gradients nor scores.

    A method that knows its blocks beforehand wraps a copy of the model without its values and makes its optimizer; the
    others refuse what they can.
    """
    misfits = {}
    with tempfile.TemporaryDirectory() as folder, each_read_once() as digests:
        context = context_of(comparison, job, runner, Path(folder))
        fingerprint(runner.model.parameters())  # read once for all copies
        for title, method in comparison.methods.items():
            try:
                args = comparison.arguments(method)
                policy = method.policy(args)
                check_policy(context.recipe, policy)
                known = method.preview(context) if method.choose else Selection(())
                if known is None:
                    continue
                wrapped = method.wrap(_without_values(runner.model, digests), known, context.recipe)
                if method.is_trained:  # a policy that does not fit the model says so when its optimizer is made
                    factory, settings = surgical_optimizer(args, policy, master_weights=False)
                    factory()(wrapped, **settings)
            except ValueError as error:  # ours, or PEFT's
                source = comparison.sources[job.source] if len(comparison.sources) > 1 else None
                misfits[title] = misfit_message(title, runner.model, error, source)
    return misfits


def _without_values(model: nn.Module, digests: MutableMapping[Tensor, bytes]) -> nn.Module:
    """A copy of a model whose weights are 0, which takes neither time nor memory; it counts as the same base."""
    same: dict[int, Any] = {}
    for weight in model.parameters():
        if type(weight) is nn.Parameter:  # packed ones are copied as they are
            same[id(weight)] = nn.Parameter(_zeros_as(weight), weight.requires_grad)
            if weight in digests:
                digests[same[id(weight)]] = digests[weight]
    return copy.deepcopy(model, same)


def _zeros_as(tensor: Tensor) -> Tensor:
    zeros = np.zeros(tensor.nbytes, np.uint8)  # torch writes its own, and memory that nobody writes costs nothing
    return torch.from_numpy(zeros).view(tensor.dtype).reshape(tensor.shape).to(tensor.device)


def _refuse(misfits: Mapping[str, str], count: int) -> None:
    if len(misfits) == 1:
        raise SurgicalError(next(iter(misfits.values())))
    if misfits:
        lines = "".join(f"\n- {message}" for message in misfits.values())
        raise SurgicalError(f"{len(misfits)} of {count} methods do not fit; change them, or leave them out:{lines}")


def _all_data(comparison: Comparison, data: LoadedData) -> list[tuple[Recipe, bool, Path | None, int]]:
    """For `make_examples`: all that will be trained or tested on, once; together no more than `ROOM` is kept."""
    pairs = [(source, seed) for source in range(len(comparison.sources)) for seed in comparison.seeds]
    wanted = [(comparison.recipe_of(*pair), False) for pair in pairs]
    tested = [recipe for pair in pairs for recipe in comparison.test_recipes(*pair)]
    wanted += [(recipe, True) for recipe in tested]
    wanted += [(replace(recipe, metric=metric), True) for recipe in tested for metric in recipe.test_metrics]
    if comparison.recipe.source_data is not None:
        wanted += [(comparison.source_recipe(source), True) for source in range(len(comparison.sources))]
    by_name = {(data.name_of(recipe), is_test): recipe for recipe, is_test in wanted}
    room = ROOM // (2 * len(by_name))  # of each split
    return [(recipe, is_test, data.made_of(recipe), room) for (_, is_test), recipe in by_name.items()]
