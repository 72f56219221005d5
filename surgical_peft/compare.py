"""`surgical-peft compare`: every method of a recipe at its best rate, against full fine-tuning, and what is noise."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from .compare_crew import Crew
from .compare_runs import Workshop
from .compare_settings import FULL, Comparison, Job
from .errors import SurgicalError
from .files import check_replaceable, whole_folder
from .paired import t_interval
from .rate_grid import MOST, best_rate, is_at_edge, next_rate
from .recipe import Recipe
from .report.comparison import markdown, sentences
from .report.comparison_plot import plot
from .run_report import PACKAGES
from .selection import Selection
from .threads import shared_threads
from .workbench import Workbench

_TABLE = "table.md"  # by which an earlier comparison is known


@dataclass(frozen=True)
class Plan:
    """What a comparison would cost.

    Attributes:
        trainings: of all grids; what is done already is among them.
        done: how many are.
        more: at most so many more, where the best rate is at the edge of its grid.
        seconds_each: of one full fine-tuning; estimated from a few steps.
        seconds: of what is left, without `more`, at most about; choosing and measuring come on top.
    """

    trainings: int
    done: int
    more: int
    seconds_each: float
    seconds: float


def plan(recipe: Recipe, output: str | Path | None = None, jobs: int = 1) -> Plan:
    """What a recipe's comparison would cost; trains a few steps to tell the time, and keeps nothing.

    Raises:
        SurgicalError: as `compare`.

    Example:
        >>> plan(load_recipe("recipes/compare_noise.yaml"), jobs=2).trainings
        96
    """
    workshop = _workshop(recipe, output, jobs)
    what = workshop.comparison
    grids = {title: what.grid(title) for title in what.methods}
    begun = [job for title, grid in grids.items() for rate in grid for job in what.trainings(title, rate)]
    done = sum(workshop.is_done(job) for job in begun)
    more = sum(MOST * len(what.trainings(title)) for title, grid in grids.items() if len(grid) > 1)
    full = what.methods[FULL]
    with shared_threads(jobs):
        each = Workbench(recipe).seconds(lambda model: full.wrap(model, Selection(()), recipe))
    at_once = min(jobs, os.cpu_count() or 1)
    return Plan(len(begun), done, more, each, math.ceil((len(begun) - done) / at_once) * each)


def compare(
    recipe: Recipe, output: str | Path | None = None, *, jobs: int = 1, console: Console | None = None
) -> dict[str, Any]:
    """Train every method of a recipe at each rate of its grid and from each seed, and measure those at the best rate.

    The rate of a method is the one with the best mean of the validation metric over all seeds and source models; a
    grid whose best rate is at its edge is extended there, by its own factor, twice at most. Only the trainings at the
    chosen rate are measured on test data. Whatever is finished is a file in `runs/`: run the same again to resume.

    Args:
        recipe: its `methods`, `rates`, `seeds`, `sources`, `draws`, `test_data` and `source_data` say what to compare.
        output: folder to write to; default is the recipe's `output_dir`. It gets `comparison/`, with `report.json`,
            `table.md` and `compare.png`, and `runs/`.
        jobs: processes that share the trainings, and the cores.
        console: where to show progress; default is the terminal.

    Returns:
        The report.

    Raises:
        SurgicalError: methods, rates, data or splits that are missing or do not fit, before any training; a worker
            that was killed. What is finished is kept.

    Example:
        >>> report = compare(load_recipe("recipes/compare_noise.yaml"), jobs=2)
        >>> report["sentences"][0]
        'first third is best: ...'
    """
    began = time.perf_counter()
    workshop = _workshop(recipe, output, jobs)
    what, folder = workshop.comparison, workshop.folder
    check_replaceable(folder / "comparison", _TABLE)
    workshop.check()
    with shared_threads(jobs), Crew(workshop, jobs, console or Console()) as crew:
        chosen = [title for title, method in what.methods.items() if method.choose]
        crew.do("choose blocks", [replace(job, kind="choice") for title in chosen for job in what.trainings(title)])
        crew.do("time steps", [what.costs])
        rates = _rates(workshop, crew)
        final = {title: what.trainings(title, best_rate(means) if means else None) for title, means in rates.items()}
        if recipe.source_data is not None:
            crew.do("source", [what.source(number) for number in range(len(what.sources))])
        crew.do("test", [replace(job, kind="test") for each in final.values() for job in each])
    rows = [_row(workshop, title, rates[title], jobs) for title, jobs in final.items()]
    report = _report(what, rows, jobs, time.perf_counter() - began)
    with whole_folder(folder / "comparison", _TABLE) as temporary:
        (temporary / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (temporary / _TABLE).write_text(markdown(report), encoding="utf-8")
        plot(report, temporary / "compare.png")
    shutil.rmtree(folder / "weights", ignore_errors=True)
    return report


def _workshop(recipe: Recipe, output: str | Path | None, jobs: int) -> Workshop:
    if jobs < 1:
        raise SurgicalError(f"jobs={jobs} is too few: 1 or more.")
    return Workshop(Comparison(recipe), Path(str(output or recipe.arguments().output_dir)))


def _rates(workshop: Workshop, crew: Crew) -> dict[str, dict[float, float]]:
    """For each method the rates that were tried, with the mean of the validation metric."""
    what = workshop.comparison
    means: dict[str, dict[float, float]] = {title: {} for title in what.methods}
    wanted: list[tuple[str, float | None]] = []
    for title in what.methods:
        wanted += [(title, rate) for rate in what.grid(title)] or [(title, None)]
    while wanted:
        jobs = {pair: what.trainings(*pair) for pair in wanted}
        crew.do("train", [job for each in jobs.values() for job in each])
        for (title, rate), each in jobs.items():
            if rate is not None:
                means[title][rate] = statistics.fmean(workshop.finding(job)["validation"] for job in each)
        for title, tried in means.items():  # weights that will not be measured
            for rate in set(tried) - {best_rate(tried)} if tried else ():
                for job in what.trainings(title, rate):
                    shutil.rmtree(workshop.weights(job), ignore_errors=True)
        following = {title: next_rate(what.grid(title), tried) for title, tried in means.items() if tried}
        wanted = [(title, rate) for title, rate in following.items() if rate is not None]
    return means


def _row(workshop: Workshop, title: str, rates: dict[float, float], jobs: Sequence[Job]) -> dict[str, Any]:
    what = workshop.comparison
    trained = [workshop.finding(job) for job in jobs]
    tested = [workshop.finding(replace(job, kind="test")) for job in jobs]
    choosing = 0.0
    if what.methods[title].choose:
        choices = [workshop.finding(replace(job, kind="choice", rate=None)) for job in jobs]
        choosing = statistics.fmean(each["seconds"] for each in choices)
    forgotten = None
    if what.recipe.source_data is not None:
        before = [workshop.finding(what.source(job.source))["on_source"] for job in jobs]
        forgotten = [own - each["on_source"] for own, each in zip(before, tested, strict=True)]
    costs = workshop.finding(what.costs)
    cost = costs.get(title)
    return {
        "method": title,
        "rates": {f"{rate:g}": mean for rate, mean in sorted(rates.items())},
        "rate": jobs[0].rate,
        "at_edge": is_at_edge(rates),
        "validation": [each["validation"] for each in trained],
        "test": [each["test"] for each in tested],
        "forgotten": forgotten,
        "blocks": [each["blocks"] for each in trained],
        "tuned_parameters": [each["tuned_parameters"] for each in trained],
        "bytes": [each["bytes"] for each in trained],
        "peak_bytes": cost and int(cost["peak_bytes"]),
        "ms": cost and cost["ms"],
        "ms_ratio": cost and cost["ms"] / costs[FULL]["ms"],
        "seconds": statistics.fmean(each["seconds"] for each in trained),
        "choosing_seconds": choosing,
    }


def _report(what: Comparison, rows: list[dict[str, Any]], jobs: int, seconds: float) -> dict[str, Any]:
    full = next(row for row in rows if row["method"] == FULL)
    others = sum(row["rate"] is not None for row in rows) - 1
    for row in rows:
        differences = [own - other for own, other in zip(row["test"], full["test"], strict=True)]
        plain = t_interval(differences)
        wide = t_interval(differences, 1 - (1 - plain.confidence) / max(1, others))
        found = {
            "mean": plain.mean,
            "interval": [plain.low, plain.high],
            "interval_of_all": [wide.low, wide.high],
        }
        row["to_full"] = None if row is full else found
    report = {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jobs} at once",
        "seconds": round(seconds, 1),
        "recipe": what.recipe.keys(),
        "metric": what.metric,
        "sources": [Path(each).name for each in what.sources],
        "seeds": list(what.seeds),
        "compared": others,
        "methods": rows,
    }
    return {**report, "sentences": sentences(report)}
