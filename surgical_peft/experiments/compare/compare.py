"""Comparison of a recipe's methods, each at its best rate, with full fine-tuning: `surgical-peft compare`."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ...atomic_files import check_replaceable, only_writer, whole_folder
from ...errors import SurgicalError
from ...scoring.progress import Stages
from ..recipe.recipe import Recipe
from ..training.workers import WorkerPool, shared_threads
from .comparison import FULL, Comparison, Job
from .cost import CostEstimate, estimate
from .findings import Findings, choice_of
from .jobs import JobRunner, check_weights
from .lr_grid import best_rate, is_diverged, next_rate
from .plot import plot
from .pool import JobPool
from .preflight import check
from .report import ComparisonReport, MethodRow
from .results import report_of, row_of
from .tables import markdown

_TABLE = "table.md"  # by which an earlier comparison is known


def plan(
    recipe: Recipe, output: str | Path | None = None, jobs: int = 1, *, console: Console | None = None
) -> CostEstimate:
    """What a recipe's comparison would cost; trains a few steps to tell the time, and keeps nothing.

    Raises:
        SurgicalError: as `compare`.

    Example:
        >>> plan(load_recipe("recipes/fashion_mnist_noise.yaml"), jobs=2).trainings
        282
    """
    job_runner = _job_runner(recipe, output, jobs)
    comparison = job_runner.comparison
    console = Stages(console).console
    check(comparison, job_runner.data, WorkerPool(1, console))
    return estimate(job_runner, jobs, console)


def compare(
    recipe: Recipe, output: str | Path | None = None, *, jobs: int = 1, console: Console | None = None
) -> ComparisonReport:
    """Train every method of a recipe at each rate of its grid and from each seed, and measure those at the best rate.

    The rate of a method is the one with the best mean of the validation metric over all seeds and source models, or
    over the first `rate_seeds` seeds where the recipe says so, and the others are trained at that rate alone; a
    grid whose best rate is at its edge is extended there, by its own factor, twice at most. Only the trainings at the
    chosen rate are measured on test data. A method whose metric is no finite number at any of its rates has diverged:
    it is said so, and compared with nothing. Methods that choose the same blocks share their trainings. Whatever is
    finished is a file in `runs/`: run the same again to resume.

    Args:
        recipe: its `methods`, `rates`, `seeds`, `rate_seeds`, `sources`, `draws`, `test_data` and `source_data` say
            what to compare.
        output: folder to write to; default is the recipe's `output_dir`. It gets `comparison/`, with `report.json`,
            `table.md` and `compare.png`, and `runs/`.
        jobs: processes that share the trainings, and the cores.
        console: where to show progress; default is the terminal.

    Returns:
        The report.

    Raises:
        SurgicalError: methods, rates, data or splits that are missing or do not fit, before any training; full
            fine-tuning that diverged at every rate; a worker that was killed; another process that compares in the
            folder, or a `weights/` in it that is not a comparison's. What is finished is kept.

    Example:
        >>> report = compare(load_recipe("recipes/fashion_mnist_noise.yaml"), jobs=2)
        >>> report.sentences[0]
        'first third is best: ...'
    """
    began = time.perf_counter()
    recipe.check_run(output)
    console = console or Console()
    with ExitStack() as stack:
        job_runner = _job_runner(recipe, output, jobs, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        folder = job_runner.findings.folder
        check_replaceable(folder / "comparison", _TABLE)
        check_weights(folder / "weights")
        stack.enter_context(only_writer(folder))
        job_runner.data.runner(job_runner.comparison.firsts[0]).task.summary.show(console)
        with shared_threads(jobs), JobPool(jobs, console) as pool:
            rows = measured_rows(job_runner, pool)
        report = report_of(job_runner.comparison, rows, jobs, time.perf_counter() - began)
        write_report(report, folder / "comparison")
        shutil.rmtree(folder / "weights", ignore_errors=True)
    return report


def measured_rows(job_runner: JobRunner, pool: JobPool, is_extended: bool = True) -> list[MethodRow]:
    """Check a comparison, do its jobs, and give the row of each method; the weights of these trainings are kept.

    Args:
        job_runner: of the comparison.
        pool: does the jobs.
        is_extended: whether a grid whose best rate is at its edge is extended.

    Raises:
        SurgicalError: as `compare`.
    """
    comparison, findings = job_runner.comparison, job_runner.findings
    check(comparison, job_runner.data, pool)
    choosing = [title for title, method in comparison.methods.items() if method.choose]
    choices = [choice_of(job) for title in choosing for job in comparison.trainings(title)]
    pool.do(job_runner, "choose blocks", choices)
    pool.do(job_runner, "time steps", [comparison.costs])
    rates = _rates(job_runner, pool, is_extended)
    final = _at_best_rates(job_runner, pool, rates)
    if comparison.recipe.source_data is not None:
        pool.do(job_runner, "source", [comparison.source(number) for number in range(len(comparison.sources))])
    measured = [trainings for title, trainings in final.items() if not is_diverged(rates[title])]
    pool.do(job_runner, "test", [replace(job, kind="test") for trainings in measured for job in trainings])
    return [row_of(findings, title, rates[title], trainings) for title, trainings in final.items()]


def write_report(report: ComparisonReport, folder: Path) -> None:
    """Write `report.json`, `table.md` and `compare.png`, in the place of those that are there, or nothing."""
    with whole_folder(folder, _TABLE) as temporary:
        (temporary / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        (temporary / _TABLE).write_text(markdown(report), encoding="utf-8")
        plot(report, temporary / "compare.png")


def _job_runner(recipe: Recipe, output: str | Path | None, jobs: int, made: Path | None = None) -> JobRunner:
    if jobs < 1:
        raise SurgicalError(f"jobs={jobs} is too few: 1 or more.")
    return JobRunner(Comparison(recipe), Path(str(output or recipe.arguments().output_dir)), made)


def _rates(job_runner: JobRunner, pool: JobPool, is_extended: bool) -> dict[str, dict[float, float]]:
    """For each method the rates that were tried, with the mean of the validation metric."""
    comparison = job_runner.comparison
    means: dict[str, dict[float, float]] = {title: {} for title in comparison.methods}
    wanted: list[tuple[str, float | None]] = []
    for title in comparison.methods:
        wanted += [(title, rate) for rate in comparison.grid(title)] or [(title, None)]
    while wanted:
        jobs = {pair: comparison.rate_trainings(*pair) for pair in wanted}
        pool.do(job_runner, "train", [job for trainings in jobs.values() for job in trainings])
        for (title, rate), trainings in jobs.items():
            if rate is not None:
                means[title][rate] = _mean(job_runner.findings, trainings)
        _drop_weights(job_runner.findings, means)
        following: dict[str, float | None] = {}
        if is_extended:
            following = {title: next_rate(comparison.grid(title), tried) for title, tried in means.items() if tried}
        if following.get(FULL) is None:
            _check_full(comparison, means)
        wanted = [(title, rate) for title, rate in following.items() if rate is not None]
    return means


def _at_best_rates(job_runner: JobRunner, pool: JobPool, rates: dict[str, dict[float, float]]) -> dict[str, list[Job]]:
    """All trainings of each method at its best rate; one that diverges from a seed is none, and gets the mean NaN."""
    comparison, findings = job_runner.comparison, job_runner.findings
    while True:
        _check_full(comparison, rates)
        best = {title: best_rate(means) if means else None for title, means in rates.items()}
        final = {title: comparison.trainings(title, rate) for title, rate in best.items()}
        pool.do(job_runner, "train at the best rates", [job for trainings in final.values() for job in trainings])
        _drop_weights(findings, rates)
        diverged = [
            title
            for title, means in rates.items()
            if means and not is_diverged(means) and not math.isfinite(_mean(findings, final[title]))
        ]
        if not diverged:
            return final
        for title in diverged:
            rates[title][best_rate(rates[title])] = math.nan


def _mean(findings: Findings, trainings: Sequence[Job]) -> float:
    """Of the validation metric; NaN where one of the trainings gave no number."""
    metrics = [findings.load(job)["validation"] for job in trainings]
    return statistics.fmean(metrics) if all(map(math.isfinite, metrics)) else math.nan


def _check_full(comparison: Comparison, means: dict[str, dict[float, float]]) -> None:
    if is_diverged(means[FULL]):
        raise SurgicalError(
            f"{FULL} diverged: {comparison.metric} on validation data is no number at any of the rates "
            f"{', '.join(f'{rate:g}' for rate in sorted(means[FULL]))}, so there is nothing to compare the others "
            "with. Write lower rates into the recipe; what is finished is kept."
        )


def _drop_weights(findings: Findings, means: dict[str, dict[float, float]]) -> None:
    """Delete the weights that will not be measured: of no method at its best rate so far."""
    tried = {(title, rate) for title, by_rate in means.items() for rate in by_rate}
    best = {(title, best_rate(by_rate)) for title, by_rate in means.items() if by_rate}
    kept = {findings.weights(job) for pair in best for job in findings.comparison.trainings(*pair)}
    for pair in tried - best:
        for job in findings.comparison.trainings(*pair):
            if findings.weights(job) not in kept:
                shutil.rmtree(findings.weights(job), ignore_errors=True)
