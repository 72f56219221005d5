"""What a comparison found, in plain data: a row for each method, and how far it is from full fine-tuning."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...atomic_files import finite
from ...errors import SurgicalError
from ..training.profiling import ms_ratio
from ..training.report import PACKAGES
from .comparison import FULL, Comparison, Job
from .jobs import JobRunner
from .lr_grid import is_at_edge, is_diverged
from .statistics import crossed_interval
from .tables import has_diverged, interval_in_words, sentences


def row_of(job_runner: JobRunner, title: str, rates: dict[float, float], jobs: Sequence[Job]) -> dict[str, Any]:
    """A method's row.

    Args:
        job_runner: has the findings.
        title: of the method.
        rates: the mean of the validation metric at each rate that was tried.
        jobs: its trainings at the best rate. Those of a method that diverged at every rate were not measured on test
            data; what is no number there, or would not be, is None.
    """
    what = job_runner.comparison
    trained = [job_runner.finding(job) for job in jobs]
    numbers: dict[str, list[float | None]] = {"test": [None] * len(jobs), "on_source": [None] * len(jobs)}
    if not is_diverged(rates):
        tested = [job_runner.finding(replace(job, kind="test")) for job in jobs]
        numbers = {key: [finite(each[key]) for each in tested] for key in tested[0]}
    choosing = 0.0
    if what.methods[title].choose:
        choices = [job_runner.finding(replace(job, kind="choice", rate=None)) for job in jobs]
        choosing = statistics.fmean(each["seconds"] for each in choices)
    forgotten = None
    if what.recipe.source_data is not None:
        before = [finite(job_runner.finding(what.source(job.source))["on_source"]) for job in jobs]
        pairs = zip(before, numbers["on_source"], strict=True)
        forgotten = [None if own is None or left is None else own - left for own, left in pairs]
    costs = job_runner.finding(what.costs)
    cost = costs.get(title)
    return {
        "method": title,
        "rates": {f"{rate:g}": finite(mean) for rate, mean in sorted(rates.items())},
        "rate": jobs[0].rate,
        "at_edge": is_at_edge(rates),
        "validation": [finite(each["validation"]) for each in trained],
        "test": numbers["test"],
        "forgotten": forgotten,
        "blocks": [each["blocks"] for each in trained],
        "tuned_parameters": [each["tuned_parameters"] for each in trained],
        "bytes": [each["bytes"] for each in trained],
        "peak_bytes": cost and int(cost["peak_bytes"]),
        "ms": cost and cost["ms"],
        "ms_ratio": cost and ms_ratio(cost, costs[FULL]),
        "seconds": statistics.fmean(each["seconds"] for each in trained),
        "choosing_seconds": choosing,
    }


def report_of(what: Comparison, rows: list[dict[str, Any]], jobs: int, seconds: float) -> dict[str, Any]:
    """The report of all rows; `to_full` goes into each.

    Args:
        what: was compared.
        rows: of `row_of`.
        jobs: processes that shared the work.
        seconds: that it took.

    Raises:
        SurgicalError: full fine-tuning gave no number on test data.
    """
    full = next(row for row in rows if row["method"] == FULL)
    if has_diverged(full):
        raise SurgicalError(
            f"{FULL} at its best rate, {full['rate']:g}, gave no number for {what.metric} on test data, so there is "
            "nothing to compare the others with: write lower rates into the recipe. What is finished is kept."
        )
    others = sum(row["rate"] is not None and not has_diverged(row) for row in rows) - 1
    for row in rows:
        row["to_full"] = None
        if row is full or has_diverged(row):
            continue
        found = [own - other for own, other in zip(row["test"], full["test"], strict=True)]
        each = len(what.seeds)
        differences = [found[start : start + each] for start in range(0, len(found), each)]  # by source model
        plain = crossed_interval(differences)
        wide = crossed_interval(differences, 1 - (1 - plain.confidence) / max(1, others))
        row["to_full"] = {
            "mean": plain.mean,
            "interval": [plain.low, plain.high],
            "interval_of_all": [wide.low, wide.high],
        }
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
    return {**report, "interval": interval_in_words(report), "sentences": sentences(report)}
