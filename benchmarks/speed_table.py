"""The table and the picture of `speed.py`, from its finished lines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgical_peft.rendering import markdown_row, new_figure

Row = dict[str, Any]
MIB = 2**20
COLUMNS = ("method", "pairs", "step, ms", "/ full", "floor", "/ floor", "peak, MiB", "optimizer, MiB")
WHOLE = ("forward / full", "file, MiB", "load, ms", "switch, ms")


def ratios(row: Row, base: str = "full_ms") -> list[float]:
    """Of each pair."""
    return [mine / other for mine, other in zip(row["ms"], row[base], strict=True)]


def over_floor(row: Row) -> list[float]:
    """Of each pair, the ratio to full over the floor of what was trained."""
    return [ratio / floor for ratio, floor in zip(ratios(row), row["floors"], strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median and the quartiles, as a cell."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def training_cells(method: str, row: Row) -> list[str]:
    """The cells that every case has."""
    return [
        method,
        str(len(row["ms"])),
        f"{statistics.median(row['ms']):.0f}",
        spread(ratios(row)),
        f"{statistics.fmean(row['floors']):.2f}",
        spread(over_floor(row)),
        f"{row['peak_bytes'] / MIB:.0f}",
        f"{row['state_bytes'] / MIB:.1f}",
    ]


def whole_cells(row: Row) -> list[str]:
    """The cells of a case that measures files and forward passes too."""
    file = f"{row['file_bytes'] / MIB:.1f}" if "file_bytes" in row else ""
    times = [f"{row[key]:.0f}" if key in row else "" for key in ("load_ms", "switch_ms")]
    return [spread(row["forward"]), file, *times]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; numbers to the right."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join(map(markdown_row, [columns, rule, *rows]))


def case_table(rows: Mapping[str, Row]) -> str:
    """The methods of one case."""
    is_whole = any("forward" in row for row in rows.values())
    cells = [training_cells(name, row) + (whole_cells(row) if is_whole else []) for name, row in rows.items()]
    return table(COLUMNS + (WHOLE if is_whole else ()), cells)


def bars_table(bars: Sequence[Any], rows: Mapping[str, Row]) -> str:
    """What is aimed at, and what was measured; a measure that has not been reached yet is left out."""
    cells = []
    for bar in bars:
        if bar.key in rows:
            values = bar.values(rows[bar.key])
            met = "yes" if statistics.median(values) <= bar.bar else "**no**"
            cells.append([bar.measure, f"{bar.bar:.2f}", spread(values, 3), met])
    return table(("measure", "at most", "measured", "met"), cells)


def scoring_text(row: Row) -> str:
    """Time and memory of scoring."""
    extra, block, kept, peak = (row[f"{key}_bytes"] / MIB for key in ("extra", "block", "kept", "peak"))
    return (
        f"Scoring takes {spread(ratios(row, 'plain_ms'), 3)} x a forward and backward pass on the same batch, "
        f"{statistics.median(row['plain_ms']):.0f} ms. On 16 tokens it holds {peak:.0f} MiB at its peak, {extra:.1f} "
        f"MiB more than passes whose gradients are dropped as they come; the gradients of the largest block are "
        f"{block:.1f} MiB. Passes that keep all gradients hold {kept:.0f} MiB."
    )


def serving_table(rows: Mapping[str, Mapping[str, Row]]) -> str:
    """Four adapters, for each model."""
    cells = [
        [f"{title}: {way}", f"{statistics.median(row['ms']):.0f}", spread(ratios(row, "bare_ms"))]
        for title, ways in rows.items()
        for way, row in ways.items()
    ]
    return table(("way", "ms", "/ bare model"), cells)


def groups_table(row: Mapping[str, Row]) -> str:
    """What a group for each block costs an optimizer's step."""
    cells = [
        [kind, str(found["plain_calls"]), str(found["calls"])]
        + [f"{statistics.median(found[key]):.2f}" for key in ("plain_ms", "ms")]
        + [f"{statistics.median(mine - base for mine, base in zip(found['ms'], found['plain_ms'], strict=True)):.2f}"]
        for kind, found in row.items()
    ]
    return table(("AdamW", "calls, 2 groups", "calls, ours", "step, ms, 2 groups", "ours", "more"), cells)


def page(header: str, bars: str, sections: Mapping[str, str]) -> str:
    """The whole table.md."""
    parts = ["# What training costs", header, bars]
    for title, text in sections.items():
        parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def plot(cases: Mapping[str, Mapping[str, Row]], device: str, path: Path) -> None:
    """A bar for each method, the time of a step over full fine-tuning, and a mark at its floor; a panel for a case."""
    most = max(len(rows) for rows in cases.values())
    with new_figure(path, 6.2 * len(cases), 1.4 + 0.32 * most) as figure:
        panels = figure.subplots(1, len(cases), squeeze=False)[0]
        for axes, (title, rows) in zip(panels, cases.items(), strict=True):
            names = list(rows)[::-1]
            values = [statistics.median(ratios(rows[name])) for name in names]
            axes.barh(names, values, color=["#0072B2" if "ours" in name else "#999999" for name in names])
            floors = [statistics.fmean(rows[name]["floors"]) for name in names]
            axes.plot(
                floors, names, "|", color="#D55E00", markersize=13, markeredgewidth=2.5, label="arithmetic floor"
            )
            for name, value, floor in zip(names, values, floors, strict=True):
                axes.text(max(value, floor) + 0.02, name, f"{value:.2f}", va="center", fontsize=9)
            axes.set_xlim(0, 1.15 * max(*values, *floors))
            axes.set_xlabel("time of a step / full fine-tuning, a ratio (less is faster)")
            axes.set_title(title, fontsize=10)
        panels[0].legend(loc="lower right", fontsize=9)
        figure.suptitle(f"Time of a training step on {device}", fontsize=11)
