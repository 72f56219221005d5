"""What does not fit in a comparison: found before anything is chosen or trained, and told all at once."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import nn

from ...blocks.block_map import BlockMap
from ...errors import SurgicalError
from ...optim.optimizer import surgical_optimizer
from ...scoring.selection import Selection
from ..tasks import Examples
from ..training.runner import RecipeRunner
from ..training.train import loader
from .comparison import Comparison, Job
from .methods import MethodContext


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
        blocks=BlockMap.find(runner.model),
        batches=partial(loader, runner.task, recipe.arguments()),
        seed=job.seed,
        folder=folder,
    )


def misfits_of(comparison: Comparison, job: Job, runner: RecipeRunner) -> dict[str, str]:
    """What is wrong with each method that does not fit a source model, by title; costs neither gradients nor scores.

    A method that knows its blocks beforehand wraps a copy of the model and makes its optimizer; the others refuse what
    they can.

    Args:
        comparison: has the methods.
        job: says which source model, and the seed.
        runner: of both.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        context = context_of(comparison, job, runner, Path(folder))
        for title, method in comparison.methods.items():
            try:
                args = comparison.arguments(method)
                policy = method.policy(args)
                known = method.preview(context) if method.choose else Selection(())
                if known is None:
                    continue
                wrapped = method.wrap(copy.deepcopy(runner.model), known, context.recipe)
                if method.is_trained:  # a policy that does not fit the model says so when its optimizer is made
                    factory, settings = surgical_optimizer(args, policy, master_weights=False)
                    factory()(wrapped, **settings)
            except ValueError as error:  # ours, or PEFT's
                source = comparison.sources[job.source] if len(comparison.sources) > 1 else None
                found[title] = in_words(title, runner.model, error, source)
    return found


def in_words(title: str, model: nn.Module, error: ValueError, source: str | None = None) -> str:
    """That a method does not fit a model, and why; `source` says which of several source models it is."""
    which = type(model).__name__ + (f" of {source}" if source else "")
    return f"{title} does not fit {which}: {error}"


def make_each(examples: Examples) -> None:
    """Make each example once: one that cannot be made is told as its task tells it."""
    for place in range(len(examples)):
        examples[place]


def refuse(misfits: Mapping[str, str], count: int) -> None:
    """Say what is wrong with all methods that do not fit, out of `count`.

    Raises:
        SurgicalError: there are some.
    """
    if len(misfits) == 1:
        raise SurgicalError(next(iter(misfits.values())))
    if misfits:
        lines = "".join(f"\n- {each}" for each in misfits.values())
        raise SurgicalError(f"{len(misfits)} of {count} methods do not fit; change them, or leave them out:{lines}")
