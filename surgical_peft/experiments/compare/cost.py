"""The cost of a comparison before it is made, from a few timed steps."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ...criteria.budget import SHARE as CHOOSING
from ...errors import SurgicalError
from ...rendering import clock
from ...scoring.selection import Selection
from ..recipe.recipe import Recipe
from ..training.cost import (
    Timing,
    depth_of,
    measuring_seconds,
    memory_in_words,
    shared,
    time_in_words,
    timed_at_once,
)
from ..training.job_progress import part_of_job
from ..training.profiling import SECONDS, SHARE
from ..training.runner import RecipeRunner
from .comparison import FULL, Comparison
from .jobs import TIMED, JobRunner
from .lr_grid import MOST
from .methods import MethodContext, make_method
from .methods.method import no_policy
from .preflight import context_of

_UNKNOWN = 0.5  # where the first layer lies that a method would choose: in the middle


@dataclass(frozen=True)
class CostEstimate:
    """What a comparison would cost.

    Attributes:
        trainings: of all grids; what is done already is among them. Methods that choose the same blocks share theirs.
        done: how many are.
        more: at most so many more, where the best rate is at the edge of its grid.
        seconds_each: of one full fine-tuning; estimated from a few steps, taken in as many processes at once as will
            share the comparison.
        seconds: of what is left with its jobs, without `more`, about; choosing, timing and measuring included.
        memory: bytes that a process takes at most.
        jobs: processes.
    """

    trainings: int
    done: int
    more: int
    seconds_each: float
    seconds: float
    memory: int
    jobs: int

    def lines(self) -> list[str]:
        """The estimate in words."""
        return [
            f"{self.trainings} trainings, of which {self.done} are done; one full fine-tuning: about "
            f"{clock(self.seconds_each)}.",
            time_in_words(self.seconds, self.jobs),
            f"At most {self.more} trainings more, where the best rate is at the edge of its grid.",
            memory_in_words(self.memory, self.jobs),
        ]


def estimate(job_runner: JobRunner, jobs: int, console: Console) -> CostEstimate:
    """The cost of the jobs of a comparison that are not done; trains a few steps."""
    comparison, findings = job_runner.comparison, job_runner.findings
    first = comparison.firsts[0]
    runner = job_runner.data.runner(first)
    here = [runner] if jobs == 1 else []  # a process of its own loads its own
    timing = timed_at_once(jobs, console, time_trainings, comparison.recipe, *here)
    steps, epochs = runner.steps(), math.ceil(runner.args.num_train_epochs)
    base = timing.whole - timing.measure - steps * timing.step
    trainings = done = more = 0
    seconds = choosing = longest = short = 0.0
    with tempfile.TemporaryDirectory() as folder:
        context = context_of(comparison, first, runner, Path(folder))
        for title, method in comparison.methods.items():
            grid, each = comparison.grid(title), timing.measure
            known = method.preview(context) if method.choose else Selection(())
            if method.is_trained:
                each = max(each, timing.seconds(_depth(known, context)))
                few = TIMED * (1 if method.policy is no_policy else epochs)
                short += base + few * (each - timing.measure - base) / steps
            planned = comparison.planned(title)
            left = sum(not any(map(findings.is_done, jobs)) for jobs in planned)
            trainings, done = trainings + len(planned), done + len(planned) - left
            more += MOST * len(comparison.rate_trainings(title)) * (len(grid) > 1)
            seconds += left * each
            longest = max(longest, each * (left > 0))
            if known is None:
                choosing += len(comparison.trainings(title)) * CHOOSING * timing.whole
    tests = len(comparison.methods) * len(comparison.trainings(FULL)) * _testing(job_runner, timing)
    timed = 0.0
    if not findings.is_done(comparison.costs):
        timed = max(short, min(SHARE * seconds, SECONDS))
    whole = timing.start + timed + shared(seconds + choosing + tests, jobs, longest)
    return CostEstimate(trainings, done, more, timing.whole, whole, timing.memory, jobs)


def _testing(job_runner: JobRunner, timing: Timing) -> float:
    """Seconds of measuring a model on test data, by all metrics, and on the data of its source model."""
    comparison, data, first = job_runner.comparison, job_runner.data, job_runner.comparison.firsts[0]
    count = len(data.test_examples(first.source, first.seed))
    if comparison.recipe.source_data is not None:
        count += 2 * len(data.source_examples(first.source))  # the metric, and the loss
    runner = data.runner(first)
    seconds = timing.measure * count / len(runner.examples["validation"])
    for metric in comparison.recipe.test_metrics:
        measure, examples = data.test_metric(first.source, first.seed, metric)
        seconds += measuring_seconds(measure, runner.model, examples)
    return seconds


def _depth(known: Selection | None, context: MethodContext) -> float:
    """Of the first layer that a method trains, as far as its blocks are known beforehand; 0 if it has none."""
    if known is None:
        return _UNKNOWN
    return depth_of(known.blocks, context.blocks.names, context.blocks.layers)


def time_trainings(recipe: Recipe, runner: RecipeRunner | None = None) -> Timing:
    """Time full fine-tuning and the last layer alone."""
    began, comparison = time.perf_counter(), Comparison(recipe)
    runner = runner or RecipeRunner(comparison.recipe_of(0, comparison.seeds[0]))
    start, validation = time.perf_counter() - began, runner.part("validation")
    recipe = runner.recipe
    measure, full = runner.task.measure, comparison.methods[FULL]
    measuring = measuring_seconds(measure, runner.model, validation)
    start += runner.reading()
    last = Selection(runner.blocks.layers[-1:])
    with part_of_job(0.0, 0.6):
        base, step, peak = runner.timed(lambda model: full.wrap(model, Selection(()), recipe))
    try:
        with part_of_job(0.6, 1.0):
            late_base, late_step, _ = runner.timed(lambda model: make_method("last").wrap(model, last, recipe))
    except SurgicalError:  # a layer that cannot be tuned alone
        late_base, late_step = base, step
    steps = runner.steps()
    whole, late = base + steps * step + measuring, late_base + steps * late_step + measuring
    return Timing(whole, late, step, measuring, start, peak)
