"""What was understood of a data set, in lines that every command prints and every report keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 10  # entries of a list before it is cut


@dataclass(frozen=True)
class DataSummary:
    """What was understood of a data set: its splits, columns, labels, and the rows that are left out.

    Summaries are added with `+`; iterating gives all lines, warnings last.

    Attributes:
        lines: a sentence each.
        warnings: what fits, and may not be what is meant.

    Example:
        >>> list(DataSummary(("no test split: none is measured",)) + DataSummary(warnings=("labels by number",)))
        ['no test split: none is measured', 'warning: labels by number']
    """

    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __add__(self, other: DataSummary) -> DataSummary:
        return DataSummary(self.lines + other.lines, self.warnings + other.warnings)

    def __iter__(self) -> Iterator[str]:
        yield from self.lines
        yield from (f"warning: {warning}" for warning in self.warnings)

    def show(self, console: Console) -> None:
        """Print the lines, warnings in yellow."""
        for line in self.lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for line in self.warnings:
            console.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def listed(entries: Sequence[object], shown: int = _SHOWN) -> str:
    """The entries with commas, cut after some.

    Example:
        >>> listed(range(12))
        '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    text = ", ".join(str(entry) for entry in entries[:shown])
    return f"{text} and {len(entries) - shown:,} more" if len(entries) > shown else text
