"""From the findings of a comparison to its report: a row for each method, and how far it is from full fine-tuning."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...atomic_files import finite
from ...errors import SurgicalError
from ..training.profiling import ms_ratio
from ..training.provenance import machine, today, versions
from .comparison import FULL, Comparison, Job
from .findings import Findings, choice_of
from .lr_grid import is_at_edge, is_diverged
from .report import ComparisonReport, Difference, MethodRow
from .statistics import crossed_interval
from .tables import interval_in_words, sentences


def row_of(findings: Findings, title: str, rates: dict[float, float], jobs: Sequence[Job]) -> MethodRow:
    """A method's row, without `to_full`.

    Args:
        findings: of the comparison.
        title: of the method.
        rates: the mean of the validation metric at each rate that was tried.
        jobs: its trainings at the best rate. Those of a method that diverged at every rate were not measured on test
            data; what is no number there, or would not be, is None.
    """
    comparison = findings.comparison
    trained = [findings.load(job) for job in jobs]
    tested = [{} if is_diverged(rates) else findings.load(replace(job, kind="test")) for job in jobs]
    choosing = 0.0
    if comparison.methods[title].choose:
        choosing = statistics.fmean(findings.load(choice_of(job))["seconds"] for job in jobs)
    forgotten = source_loss_rise = None
    if comparison.recipe.source_data is not None:
        before = [findings.load(comparison.source(job.source)) for job in jobs]
        forgotten = _lost(_numbers(before, "on_source"), _numbers(tested, "on_source"))
        source_loss_rise = _lost(_numbers(tested, "source_loss"), _numbers(before, "source_loss"))
    costs = findings.load(comparison.costs)
    cost = costs.get(title)
    return MethodRow(
        method=title,
        rates={f"{rate:g}": finite(mean) for rate, mean in sorted(rates.items())},
        rate=jobs[0].rate,
        at_edge=is_at_edge(rates),
        validation=_numbers(trained, "validation"),
        test=_numbers(tested, "test"),
        test_metrics={
            metric: _numbers([finding.get("test_metrics", {}) for finding in tested], metric)
            for metric in comparison.test_metrics
        },
        forgotten=forgotten,
        source_loss_rise=source_loss_rise,
        blocks=[finding["blocks"] for finding in trained],
        tuned_parameters=[finding["tuned_parameters"] for finding in trained],
        bytes=[finding["bytes"] for finding in trained],
        peak_bytes=cost and int(cost["peak_bytes"]),
        ms=cost and cost["ms"],
        ms_ratio=cost and ms_ratio(cost, costs[FULL]),
        seconds=statistics.fmean(finding["seconds"] for finding in trained),
        choosing_seconds=choosing,
        grid=comparison.grid(title),
    )


def _numbers(findings: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    return [finite(finding[key]) if key in finding else None for finding in findings]


def _lost(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    """The differences, None where a number is missing: of what an earlier version measured, say."""
    pairs = zip(before, after, strict=True)
    return [None if first is None or left is None else first - left for first, left in pairs]


def report_of(comparison: Comparison, rows: Sequence[MethodRow], jobs: int, seconds: float) -> ComparisonReport:
    """The report of all rows, with the difference of each to full fine-tuning.

    Args:
        comparison: that was made.
        rows: of `row_of`.
        jobs: processes that shared the work.
        seconds: that it took.

    Raises:
        SurgicalError: full fine-tuning gave no number on test data.
    """
    full = next(row for row in rows if row.method == FULL)
    if full.has_diverged:
        raise SurgicalError(
            f"{FULL} at its best rate, {full.rate:g}, gave no number for {comparison.metric} on test data, so there "
            "is nothing to compare the others with: write lower rates into the recipe. What is finished is kept."
        )
    compared = sum(row.rate is not None and not row.has_diverged for row in rows) - 1
    report = ComparisonReport(
        date=today(),
        versions=versions(),
        machine=f"{machine()}, {jobs} at once",
        seconds=round(seconds, 1),
        recipe=comparison.recipe.keys(),
        metric=comparison.metric,
        sources=[Path(source).name for source in comparison.sources],
        seeds=list(comparison.seeds),
        compared=compared,
        split=comparison.split,
        methods=[replace(row, to_full=_to_full(row, full, len(comparison.seeds), compared)) for row in rows],
    )
    return replace(report, interval=interval_in_words(report), sentences=sentences(report))


def _to_full(row: MethodRow, full: MethodRow, seeds: int, compared: int) -> Difference | None:
    if row is full or row.has_diverged:
        return None
    differences = [value - other for value, other in zip(row.results, full.results, strict=True)]
    by_source = [differences[start : start + seeds] for start in range(0, len(differences), seeds)]
    plain = crossed_interval(by_source)
    wide = crossed_interval(by_source, 1 - (1 - plain.confidence) / max(1, compared))
    return Difference(plain.mean, plain.bounds, wide.bounds)
