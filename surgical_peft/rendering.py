"""Figures that are written whole, tables for the terminal and in Markdown, times for people."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic_files import whole_file
from .errors import SurgicalError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

NO_FIGURES = "drawing needs matplotlib, which is not installed: pip install 'surgical-peft[experiments]'."
_ESCAPED = r"\\\g<0>"
_BAR = r"(?<!\\)\|"
# Where an underscore is no part of a word, an ampersand begins an entity, and a colon or a point an address.
_MARKUP = r"[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=[\w#])|:(?=//)|(?<=www)\."
_LIST = r"^(\d*)([.)]|[-+=]+|#{1,6})(?=\s|$)"  # how a list, a heading or a rule begins
_KEPT = "\u00a0\u202f\u200c\u200d"  # spaces and joiners that hold words together


def can_draw() -> bool:
    """True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def new_figure(path: str | Path, width: float, height: float, dpi: float = 150) -> Iterator[Figure]:
    """A figure of so many inches, written to `path` (png, pdf or svg) at the end; whole or not at all.

    Raises:
        SurgicalError: matplotlib is not installed.

    Example:
        >>> with new_figure("bars.png", 5, 3) as figure:
        ...     figure.subplots().bar(["a", "b"], [1, 2])
    """
    if not can_draw():
        raise SurgicalError(NO_FIGURES)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    with whole_file(path) as temporary:
        figure.savefig(temporary)


def mark_cut(axes: Axes, name: str) -> None:
    """Mark the axis `"x"` or `"y"` as one that does not begin at zero: two strokes where it begins, and in words."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_label_text(f"{axis.get_label_text()}\n(the axis is cut: it does not begin at 0)")
    for at in (0.02, 0.04):
        place = ([at], [0]) if name == "x" else ([0], [at])
        stroke = [(-0.5, -1), (0.5, 1)] if name == "x" else [(-1, -0.5), (1, 0.5)]
        axes.plot(*place, marker=stroke, markersize=7, color="#222222", clip_on=False, transform=axes.transAxes)


def markdown_row(cells: Sequence[str]) -> str:
    """`| a | b |`, whatever is in the cells: lines become one, and bars are no bounds of columns.

    Example:
        >>> markdown_row(["a|b", "**c**"])
        '| a\\|b | **c** |'
    """
    return f"| {' | '.join(re.sub(_BAR, _ESCAPED, _one_line(cell)) for cell in cells)} |"


def markdown_text(text: Any) -> str:
    """Text for Markdown as it stands, in one line: nothing in it is markup, a link, HTML or the start of a list.

    Example:
        >>> markdown_text("my_run: <b>[x](y)</b>")
        'my_run: \\<b\\>\\[x\\](y)\\</b\\>'
    """
    line = re.sub(_MARKUP, _ESCAPED, _one_line(text).strip())
    return re.sub(_LIST, r"\1\\\2", line)


def markdown_code(text: Any) -> str:
    """Text as a code span of Markdown, whatever is in it.

    Example:
        >>> markdown_code("a`b")
        '``a`b``'
    """
    line = _one_line(text).strip() or " "
    ticks = "`" * (_longest_run(line) + 1)
    space = " " * ("`" in (line[0], line[-1]))
    return f"{ticks}{space}{line}{space}{ticks}"


def markdown_block(text: str, language: str) -> str:
    """Lines of code as a block of Markdown, fenced by more backticks than are in it."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _one_line(text: Any) -> str:
    """Without breaks of lines and control characters."""
    return "".join(char if char.isprintable() or char in _KEPT else " " for char in str(text))


@dataclass(frozen=True)
class TextTable:
    """A table for the terminal that cuts no word: where there is little room, words take more lines.

    Where it is too wide, names of columns and cells of words are wrapped; where that is not enough, the first cell of
    each row gets a line of its own. A no-break space holds words together.

    Attributes:
        title: above it.
        header: a name for each column.
        rows: of cells.
        notes: under it, what its marks and columns mean.
        left: columns of words, which stand at the left; the others are numbers, and stay whole.
        bold: rows that stand out.

    Example:
        >>> print(TextTable("Blocks", ["block", "score"], [["embeddings", "0.31"], ["block 0", "0.05"]]))
        Blocks
        block       score
        ─────────────────
        embeddings   0.31
        block 0      0.05
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    left: Collection[int] = (0,)
    bold: Collection[int] = ()

    def lines(self, width: int) -> list[tuple[str, str]]:
        """The lines for a terminal of so many columns, each with its style."""
        widths = self._widths(range(len(self.header)), width)
        if is_split := sum(widths) + 2 * (len(widths) - 1) > width and len(widths) > 2:
            widths = [2, *self._widths(range(1, len(self.header)), width - 4)]
        head = textwrap.wrap(self.title, width, break_on_hyphens=False)
        names = self.header if not is_split else ["", *self.header[1:]]
        body = [(self.header[0], "bold")] * is_split
        body += [(line, "bold") for line in self._row(names, widths, at_end=True)]
        body.append(("─" * min(width, sum(widths) + 2 * (len(widths) - 1)), ""))
        for number, row in enumerate(self.rows):
            style = "bold" * (number in self.bold)
            body += [(row[0], style)] * is_split
            body += [(line, style) for line in self._row(["", *row[1:]] if is_split else row, widths)]
        how = {"width": width, "subsequent_indent": "  ", "break_on_hyphens": False}
        notes = [line for note in self.notes for line in textwrap.wrap(note, **how)]  # type: ignore[arg-type]
        return [*((line, "italic") for line in head), *body, *((line, "") for line in notes)]

    def _widths(self, columns: Sequence[int], room: int) -> list[int]:
        """Of each of the columns; those of words get what the numbers leave, and no less than their longest word."""
        cells = {column: [row[column] for row in self.rows] for column in columns}
        gaps = 2 * (len(columns) - 1)
        for names in ({c: len(self.header[c]) for c in columns}, {c: _longest_word(self.header[c]) for c in columns}):
            widths = {column: max([names[column], *map(len, cells[column])]) for column in columns}
            if sum(widths.values()) + gaps <= room:
                break
        for column in sorted((column for column in columns if column in self.left), key=lambda c: -widths[c]):
            least = max([names[column], *map(_longest_word, cells[column])])
            excess = sum(widths.values()) + gaps - room
            widths[column] -= max(0, min(excess, widths[column] - least))
        return list(widths.values())

    def _row(self, cells: Sequence[str], widths: Sequence[int], at_end: bool = False) -> list[str]:
        """The lines of one row; with `at_end` its cells end in the same line."""
        parts = [_wrapped(cell, width) for cell, width in zip(cells, widths, strict=True)]
        height = max(map(len, parts))
        for part in parts:
            empty = [""] * (height - len(part))
            part[:] = [*empty, *part] if at_end else [*part, *empty]
        lines = []
        for line in zip(*parts, strict=True):
            texts = [
                text.ljust(width) if column in self.left else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append("  ".join(texts).rstrip())
        return lines

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self.lines(10_000))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        for line, style in self.lines(options.max_width):
            yield Text(line, style, overflow="fold")


def _longest_word(text: str) -> int:
    return max(map(len, text.split(" ")))


def _wrapped(cell: str, width: int) -> list[str]:
    return textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]


_EXACT = 600  # seconds, from which on a time has no seconds


def clock(seconds: float) -> str:
    """A time for people: `42 s`, `1:30 min`, `26 min` or `1:02 h`.

    Example:
        >>> clock(90)
        '1:30 min'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < _EXACT:
        return f"{whole // 60}:{whole % 60:02} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}:{minutes:02} h" if hours else f"{minutes} min"
