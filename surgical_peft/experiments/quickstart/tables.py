"""Tables of methods compared on several shifts, for the terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ...rendering import markdown_row


def comparison_table(report: dict[str, Any]) -> Table:
    """The report of a comparison as a table of 80 columns; the best accuracy of each shift is bold.

    The chosen rates are left out; `comparison_markdown` has them.
    """
    header, rows = _cells(report, bold="[bold]{}[/bold]")
    shifts = report["methods"][0]["shifts"]
    shown = [index for index, name in enumerate(header) if name != "rate"]
    table = Table(title=_title(report), box=SIMPLE_HEAD, pad_edge=False)
    for index in shown:
        words = header[index] if header[index] in shifts else "\n".join(header[index].rsplit(" ", 1))
        table.add_column(words, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    return table


def comparison_markdown(report: dict[str, Any]) -> str:
    """The same table as Markdown, with a line on where it comes from."""
    header, rows = _cells(report, bold="**{}**")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        markdown_row(header),
        markdown_row(["---", *["---:"] * (len(header) - 1)]),
        *map(markdown_row, rows),
        "",
        f"{_title(report)}. {report['date']}, {versions}; {report['machine']}; {report['seconds']:.0f} s in all.",
    ]
    return "\n".join(lines) + "\n"


def _cells(report: dict[str, Any], bold: str) -> tuple[list[str], list[list[str]]]:
    methods = report["methods"]
    shifts = list(methods[0]["shifts"])
    best = {shift: max(statistics.mean(each["shifts"][shift]["test"]) for each in methods) for shift in shifts}
    rows = []
    for each in methods:
        cells = [each["method"]]
        for shift in shifts:
            test = each["shifts"][shift]["test"]
            text = mean_and_spread(test)
            cells.append(bold.format(text) if statistics.mean(test) == best[shift] else text)
            rate = each["shifts"][shift]["rate"]
            cells.append("-" if rate is None else f"{rate:g}")
        cells.append(f"{each['parameters']:,}")
        cells.append("-" if each["ms"] is None else f"{each['ms']:.1f}")
        cells.append("-" if each["bytes"] is None else f"{each['bytes'] / 1000:,.0f}")
        rows.append(cells)
    columns = [name for shift in shifts for name in (shift, "rate")]
    return ["method", *columns, "tuned parameters", "ms a step", "file, kB"], rows


def mean_and_spread(accuracies: Sequence[float]) -> str:
    """Shares as one cell, in percent: `74.9 ± 0.5`; of a single one there is no spread."""
    spread = f" ± {100 * statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{100 * statistics.mean(accuracies):.1f}{spread}"


def _title(report: dict[str, Any]) -> str:
    return (
        f"Test accuracy in %, mean ± standard deviation of {len(report['seeds'])} draws of 500 images, "
        f"{report['epochs']:g} epochs, rates chosen on validation"
    )
