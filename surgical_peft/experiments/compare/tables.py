"""Report of a comparison as a table and in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ...rendering import TextTable, markdown_row, markdown_text
from ..training.source_data import SOURCE_LOSS, unit_of_loss
from .report import ComparisonReport, MethodRow

_COLUMNS = ["method", "{metric}", "to full", "rate", "tuned", "step", "memory, MB", "file, kB", "choosing, s"]


def table(report: ComparisonReport) -> TextTable:
    """The report as a table of 80 columns; the best method is bold. What a method costs is in `markdown`."""
    header, rows = _cells(report, "{}")
    shown = [number for number, name in enumerate(header) if number < 4 or name in ("step", SOURCE_LOSS)]
    best = max(row.mean for row in report.methods if not row.has_diverged)
    return TextTable(
        f"{report.split.capitalize()} {report.metric}, {trainings_of(report)}",
        [header[number].replace(", %", ",\u00a0%") for number in shown],
        [[row[number] for number in shown] for row in rows],
        _legend(report),
        bold=[number for number, row in enumerate(report.methods) if not row.has_diverged and row.mean == best],
    )


def _legend(report: ComparisonReport) -> list[str]:
    """What the columns and marks of the table mean."""
    means = "Mean ± standard deviation over the trainings. " * any(len(row.test) > 1 for row in report.methods)
    points = " in points" * scale_of(report)[0]
    notes = [
        f"{means}To full: paired difference to full fine-tuning{points}. {interval_in_words(report)}",
        f"Rate: the best on validation data{_choosing(report)}. Step: its time as a part of full fine-tuning's.",
    ]
    if _tells_source_loss(report):
        notes.append(f"Source loss: its rise on the source model's own data, in {unit_of_loss(report.recipe)}.")
    return notes + _marks(report)


def _mark(row: MethodRow) -> str:
    return "+" * row.is_rate_added + "*" * row.at_edge


def _marks(report: ComparisonReport) -> list[str]:
    """What the marks of the rates mean."""
    notes = []
    if any(row.is_rate_added for row in report.methods):
        notes.append("+ a rate that the recipe does not name: it was added, as the best was at the edge of the grid.")
    if any(row.at_edge for row in report.methods):
        notes.append("* the lowest or highest that was tried: the best rate may lie beyond.")
    return notes


def markdown(report: ComparisonReport) -> str:
    """The report as Markdown: what won, the table, and how to read it."""
    header, rows = _cells(report, "**{}**", markdown_text)
    ruler = ["---", *["---:"] * (len(header) - 1)]
    lines = [markdown_text(" ".join(report.sentences)), "", markdown_row(header), markdown_row(ruler)]
    lines += map(markdown_row, rows)
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    starred = " (* still there)" if any(row.at_edge for row in report.methods) else ""
    added = " (+ a rate added so)" if any(row.is_rate_added for row in report.methods) else ""
    lines += [
        "",
        f"{report.split.capitalize()} {markdown_text(report.metric)}: mean ± standard deviation of "
        f"{trainings_of(report)}. To full: the paired difference to full fine-tuning. {interval_in_words(report)} "
        f"Each rate has the best mean on validation data{_choosing(report)} of its grid, extended where that was at "
        f"the edge{added}{starred}. Tuned: parameters. Step: its time, as a part of full fine-tuning's: all take "
        "turns in one process, and the median over the rounds counts. Memory: the most that is alive at once in a "
        "step. Choosing: of the blocks, once for each training." + _further_columns(report),
        "",
        markdown_text(f"{report.date}, {versions}; {report.machine}."),
    ]
    return "\n".join(lines) + "\n"


def _choosing(report: ComparisonReport) -> str:
    """Which seeds chose the rates, where not all did."""
    count = report.recipe.get("rate_seeds", len(report.seeds))
    first = "the first" if count == 1 else f"the first {count}"
    return "" if count == len(report.seeds) else f" ({first} of {len(report.seeds)} seeds)"


def _further_columns(report: ComparisonReport) -> str:
    """What the columns mean that only some comparisons have."""
    text = ""
    for metric, count in report.recipe.get("test_metrics", {}).items():
        examples = "all" if count is None else f"at most {count:,}"
        text += f" The column {markdown_text(metric)} is of {examples} of these examples."
    if _tells_forgetting(report):
        unit = "" if scale_of(report)[0] else f", in {markdown_text(report.metric)}"
        text += f" Forgets: what is lost on the source model's own data{unit}."
    if _tells_source_loss(report):
        text += f" Source loss: its rise there, in {unit_of_loss(report.recipe)}."
    return text


def sentences(report: ComparisonReport) -> list[str]:
    """What won and by how much, and whether that is more than noise.

    Of several methods the best one owes something to luck. So its interval has to stay clear of zero also when it is
    widened for the number of methods compared (Bonferroni). Where all differences are equal none is told, and nothing
    is claimed.
    """
    lost = [row.method for row in report.methods if row.has_diverged]
    notes = [f"At every rate diverged: {', '.join(lost)}."] if lost else []
    if report.split != "test":
        notes.append(
            "There is no test split: the rates were chosen on the same examples, so all numbers are a little too good."
        )
    if report.recipe.get("unlabelled"):
        notes.append(
            "No label of the training split was used; those of the validation split chose the rates."
            if report.recipe["unlabelled"] is True
            else "No label of the streams was used to adapt; those of the validation stream chose the rates."
        )
    return [*_verdict(report), *notes]


def _verdict(report: ComparisonReport) -> list[str]:
    rows = [row for row in report.methods if row.rate is not None and not row.has_diverged]
    ranked = sorted(rows, key=lambda row: -row.mean)
    best = ranked[0]
    is_share, unit = scale_of(report)
    first = f"{best.method} is best: {_number(report, best.mean)}{' %' * is_share} {report.split} "
    first += f"{report.metric}, mean of {trainings_of(report)}"
    if len(ranked) == 1:
        return [f"{first}.", "There is nothing to compare it with."]
    rival = ranked[1] if best.to_full is None else best
    difference = rival.to_full
    assert difference is not None  # only full fine-tuning has none, and it is not its own rival
    size = f"{_number(report, abs(difference.mean))}{unit}"
    if rival is best:
        first += f", {size} above full fine-tuning"
    else:
        first += f", {size} above the next, {rival.method}"
    bounds, wide = difference.bounds, difference.wide_bounds
    if bounds is None or wide is None:
        is_one = len(rival.test) == 1
        why = "With one training each" if is_one else "Every training differs by the same, and from that"
        return [f"{first}.", f"{why} nothing can be said about noise."]
    first += f" (95 % interval of {rival.method} to full: {_range(report, bounds)})."
    count = report.compared
    widened = f"widened for the {count} methods compared it is {_range(report, wide)}"
    if bounds[0] <= 0 <= bounds[1]:
        return [first, "That is not more than noise: the interval holds zero."]
    if count > 1 and wide[0] <= 0 <= wide[1]:
        return [first, f"That may be luck: the interval is clear of zero by itself, but {widened}."]
    return [first, f"That is more than noise: {f'{widened}, ' if count > 1 else 'the interval is '}clear of zero."]


def scale_of(report: ComparisonReport) -> tuple[bool, str]:
    """Whether the metric is a share, to be shown in percent, and the word for a difference."""
    is_share = all(0 <= value <= 1 for row in report.methods for value in row.results)
    return is_share, " points" * is_share


def trainings_of(report: ComparisonReport) -> str:
    """How many trainings a mean is of, in words."""
    seeds, sources = len(report.seeds), len(report.sources)
    count = f"{seeds} training{'s' * (seeds > 1)}"
    return f"{count} of each of {sources} source models" if sources > 1 else count


def interval_in_words(report: ComparisonReport) -> str:
    """What the interval of a difference is of, and what it does not cover."""
    draws = "draws and seeds" if report.recipe.get("draws") else "seeds"
    several = {draws: len(report.seeds) > 1, "source models": len(report.sources) > 1}
    covered = [name for name, is_told in several.items() if is_told]
    if not covered:
        return "One training each tells no interval."
    text = "In brackets its 95 % t interval"
    if len(covered) > 1:
        text += f", the wider of that of the {draws}, each averaged over the source models, and that of the source "
        text += f"models, each averaged over the {draws}"
    return f"{text}: it covers {' and '.join(covered)}, not which examples are in the test set."


def _cells(
    report: ComparisonReport, bold: str, shown: Callable[[str], str] = str
) -> tuple[list[str], list[list[str]]]:
    best = max(row.mean for row in report.methods if not row.has_diverged)
    rows = []
    for row in report.methods:
        mean = None if row.has_diverged else row.mean
        result = "diverged" if mean is None else _with_spread(row.results, scale_of(report)[0])
        difference = "-"
        if row.to_full is not None:
            difference = _number(report, row.to_full.mean, "+")
            difference += f" ({_range(report, row.to_full.bounds)})" if row.to_full.bounds else ""
        counts = sorted(set(row.tuned_parameters))
        sizes = [size for size in row.bytes if size is not None]
        cells = [
            shown(row.method),
            result,
            difference,
            "-" if row.rate is None else f"{row.rate:g}{_mark(row)}",
            f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}",
            "-" if row.ms_ratio is None else f"{row.ms_ratio:.2f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
            f"{statistics.fmean(sizes) / 1000:,.0f}" if sizes else "-",
            f"{row.choosing_seconds:.1f}" if row.choosing_seconds >= 0.05 else "-",
        ]
        for metric, values in row.test_metrics.items():
            numbers = [value for value in values if value is not None]
            cells.append(_with_spread(numbers, _is_share(report, metric)) if len(numbers) == len(values) else "-")
        if row.forgotten is not None:
            told = [value for value in row.forgotten if value is not None]
            cells.append(_number(report, statistics.fmean(told)) if len(told) == len(row.forgotten) else "-")
        if _tells_source_loss(report):
            rises = row.source_loss_rise or [None]
            told = [value for value in rises if value is not None]
            cells.append(f"{statistics.fmean(told):+.3f}" if len(told) == len(rises) else "-")
        if mean == best:
            cells[:2] = [bold.format(cell) for cell in cells[:2]]
        rows.append(cells)
    header = [name.format(metric=shown(report.metric) + ", %" * scale_of(report)[0]) for name in _COLUMNS]
    further = [shown(metric) + ", %" * _is_share(report, metric) for metric in report.methods[0].test_metrics]
    forgetting = [*["forgets"] * _tells_forgetting(report), *[SOURCE_LOSS] * _tells_source_loss(report)]
    return [*header, *further, *forgetting], rows


def _is_share(report: ComparisonReport, metric: str) -> bool:
    """Whether one of the recipe's `test_metrics` is shown in percent."""
    values = [value for row in report.methods for value in row.test_metrics[metric]]
    return all(0 <= value <= 1 for value in values if value is not None)


def _with_spread(values: Sequence[float], is_share: bool) -> str:
    """Mean ± standard deviation."""
    cell = _scaled(statistics.fmean(values), is_share)
    return f"{cell} ± {_scaled(statistics.stdev(values), is_share)}" if len(values) > 1 else cell


def _tells_forgetting(report: ComparisonReport) -> bool:
    return any(row.forgotten is not None for row in report.methods)


def _tells_source_loss(report: ComparisonReport) -> bool:
    return any(row.source_loss_rise for row in report.methods)


def _number(report: ComparisonReport, value: float, sign: str = "") -> str:
    return _scaled(value, scale_of(report)[0], sign)


def _scaled(value: float, is_share: bool, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if is_share else f"{value:{sign}.4g}"


def _range(report: ComparisonReport, bounds: tuple[float, float]) -> str:
    return " to ".join(_number(report, bound, "+") for bound in bounds)
