"""A comparison's report as a table and in words."""

from __future__ import annotations

import statistics
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...rendering import markdown_row

_COLUMNS = ["method", "{metric}", "to full", "rate", "tuned", "step", "memory, MB", "file, kB", "choosing, s"]


def table(report: dict[str, Any]) -> Table:
    """The report as a table of 80 columns; the best method is bold. What a method costs is in `markdown`."""
    header, rows = _cells(report, "[bold]{}[/bold]")
    found = Table(title=f"Test {report['metric']}, {trainings_of(report)}", box=SIMPLE_HEAD, pad_edge=False)
    shown = [number for number, name in enumerate(header) if number < 4 or name == "step"]
    for number in shown:
        found.add_column(header[number], justify="right" if number else "left", no_wrap=True)
    for row in rows:
        found.add_row(*(row[number] for number in shown))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: what won, the table, and how to read it."""
    header, rows = _cells(report, "**{}**")
    ruler = ["---", *["---:"] * (len(header) - 1)]
    lines = [" ".join(report["sentences"]), "", markdown_row(header), markdown_row(ruler)]
    lines += map(markdown_row, rows)
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    starred = " (* still there)" if any(row["at_edge"] for row in report["methods"]) else ""
    lines += [
        "",
        f"Test {report['metric']}: mean ± standard deviation of {trainings_of(report)}. To full: the paired "
        f"difference to full fine-tuning. {interval_in_words(report)} Each rate has the best mean on validation data "
        f"of its grid, extended where that was at the edge{starred}. Tuned: parameters. Step: its time, as a part of "
        "full fine-tuning's: all take turns in one process, and the median over the rounds counts. Memory: the most "
        "that is alive at once in a step. "
        "Choosing: of the blocks, once for each training."
        + (" Forgets: what is lost on the source model's own data." if _tells_forgetting(report) else ""),
        "",
        f"{report['date']}, {versions}; {report['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def sentences(report: dict[str, Any]) -> list[str]:
    """What won and by how much, and whether that is more than noise.

    Of several methods the best one owes something to luck. So its interval has to stay clear of zero also when it is
    widened for the number of methods compared (Bonferroni). Where all differences are equal none is told, and nothing
    is claimed.
    """
    lost = [row["method"] for row in report["methods"] if has_diverged(row)]
    return [*_verdict(report), *([f"At every rate diverged: {', '.join(lost)}."] if lost else [])]


def _verdict(report: dict[str, Any]) -> list[str]:
    rows = [row for row in report["methods"] if row["rate"] is not None and not has_diverged(row)]
    ranked = sorted(rows, key=lambda row: -statistics.fmean(row["test"]))
    best = ranked[0]
    is_share, unit = scale_of(report)
    first = f"{best['method']} is best: {_number(report, statistics.fmean(best['test']))}{' %' * is_share} test "
    first += f"{report['metric']}, mean of {trainings_of(report)}"
    if len(ranked) == 1:
        return [f"{first}.", "There is nothing to compare it with."]
    rival = ranked[1] if best["to_full"] is None else best
    found = rival["to_full"]
    size = f"{_number(report, abs(found['mean']))}{unit}"
    if rival is best:
        first += f", {size} above full fine-tuning"
    else:
        first += f", {size} above the next, {rival['method']}"
    low, high = found["interval"]
    if low is None:
        is_one = len(rival["test"]) == 1
        why = "With one training each" if is_one else "Every training differs by the same, and from that"
        return [f"{first}.", f"{why} nothing can be said about noise."]
    first += f" (95 % interval of {rival['method']} to full: {_range(report, low, high)})."
    wide = found["interval_of_all"]
    count = report["compared"]
    widened = f"widened for the {count} methods compared it is {_range(report, *wide)}"
    if low <= 0 <= high:
        return [first, "That is not more than noise: the interval holds zero."]
    if count > 1 and wide[0] <= 0 <= wide[1]:
        return [first, f"That may be luck: the interval is clear of zero by itself, but {widened}."]
    return [first, f"That is more than noise: {f'{widened}, ' if count > 1 else 'the interval is '}clear of zero."]


def has_diverged(row: dict[str, Any]) -> bool:
    """Whether a method gave no number, at its best rate."""
    return None in row["test"]


def scale_of(report: dict[str, Any]) -> tuple[bool, str]:
    """Whether the metric is a share, to be shown in percent, and the word for a difference."""
    is_share = all(0 <= value <= 1 for row in report["methods"] for value in row["test"] if value is not None)
    return is_share, " points" * is_share


def trainings_of(report: dict[str, Any]) -> str:
    """How many trainings a mean is of, in words."""
    seeds, sources = len(report["seeds"]), len(report["sources"])
    count = f"{seeds} training{'s' * (seeds > 1)}"
    return f"{count} of each of {sources} source models" if sources > 1 else count


def interval_in_words(report: dict[str, Any]) -> str:
    """What the interval of a difference is of, and what it does not cover."""
    own = "draws and seeds" if report["recipe"].get("draws") else "seeds"
    several = {own: len(report["seeds"]) > 1, "source models": len(report["sources"]) > 1}
    covered = [name for name, is_told in several.items() if is_told]
    if not covered:
        return "One training each tells no interval."
    found = "In brackets its 95 % t interval"
    if len(covered) > 1:
        found += f", the wider of that of the {own}, each averaged over the source models, and that of the source "
        found += f"models, each averaged over the {own}"
    return f"{found}: it covers {' and '.join(covered)}, not which examples are in the test set."


def _cells(report: dict[str, Any], bold: str) -> tuple[list[str], list[list[str]]]:
    best = max(statistics.fmean(row["test"]) for row in report["methods"] if not has_diverged(row))
    rows = []
    for row in report["methods"]:
        mean = None if has_diverged(row) else statistics.fmean(row["test"])
        result = "diverged" if mean is None else _number(report, mean)
        if mean is not None and len(row["test"]) > 1:
            result += f" ± {_number(report, statistics.stdev(row['test']))}"
        difference = "-"
        if row["to_full"] is not None:
            difference = _number(report, row["to_full"]["mean"], "+")
            low, high = row["to_full"]["interval"]
            difference += "" if low is None else f" ({_range(report, low, high)})"
        counts = sorted(set(row["tuned_parameters"]))
        sizes = [size for size in row["bytes"] if size is not None]
        cells = [
            row["method"],
            result,
            difference,
            "-" if row["rate"] is None else f"{row['rate']:g}{'*' if row['at_edge'] else ''}",
            f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}",
            "-" if row["ms_ratio"] is None else f"{row['ms_ratio']:.2f}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.1f}",
            f"{statistics.fmean(sizes) / 1000:,.0f}" if sizes else "-",
            f"{row['choosing_seconds']:.1f}" if row["choosing_seconds"] >= 0.05 else "-",
        ]
        if row["forgotten"] is not None:
            cells.append("-" if None in row["forgotten"] else _number(report, statistics.fmean(row["forgotten"])))
        if mean == best:
            cells[:2] = [bold.format(cell) for cell in cells[:2]]
        rows.append(cells)
    header = [*_COLUMNS, *["forgets"] * _tells_forgetting(report)]
    return [name.format(metric=report["metric"] + ", %" * scale_of(report)[0]) for name in header], rows


def _tells_forgetting(report: dict[str, Any]) -> bool:
    return any(row["forgotten"] is not None for row in report["methods"])


def _number(report: dict[str, Any], value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if scale_of(report)[0] else f"{value:{sign}.4g}"


def _range(report: dict[str, Any], low: float, high: float) -> str:
    return f"{_number(report, low, '+')} to {_number(report, high, '+')}"
