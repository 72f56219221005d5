"""The candidates of advice: how each chooses its blocks, and how many parameters it tunes."""

from __future__ import annotations

import copy
import tempfile
import time
from functools import partial
from pathlib import Path

from ...errors import SurgicalError
from ...scoring.selection import Selection
from ..compare.comparison import Comparison
from ..compare.methods import MethodContext
from ..training.runner import RecipeRunner
from ..training.train import loader
from .successive_halving import Candidate, ShortTraining, ValidationJudge

CANDIDATES = ("nothing", "full", "layer_decay", "head", "first", "middle", "last", "auto")


def find_candidates(comparison: Comparison, runner: RecipeRunner) -> tuple[dict[str, Candidate], dict[str, str]]:
    """All candidates by name, with their blocks chosen; and why some do not fit the model, such as a tied head."""
    candidates: dict[str, Candidate] = {}
    unfit: dict[str, str] = {}
    recipe, args = comparison.recipe, runner.args
    with tempfile.TemporaryDirectory() as folder:
        context = MethodContext(
            recipe, runner.model, runner.blocks, partial(loader, runner.task, args), args.seed, Path(folder)
        )
        for name, method in zip(CANDIDATES, comparison.methods.values(), strict=True):
            try:
                selection = method.choose(context) if method.choose else Selection(())
                wrapped = method.wrap(copy.deepcopy(runner.model), selection, recipe)
            except SurgicalError as error:
                if method.choose is None:
                    raise
                unfit[name] = str(error)
                continue
            tuned = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
            candidates[name] = Candidate(name, method, selection, tuned)
    return candidates, unfit


def measure_untrained(candidate: Candidate, runner: RecipeRunner, judge: ValidationJudge) -> None:
    """Read the model as it is, in the place of a training."""
    began = time.perf_counter()
    groups = judge.read(runner.model)
    candidate.probes.append(ShortTraining(None, 0.0, judge.metric(groups), groups, time.perf_counter() - began, 0.0))
