"""Figures that are written whole, rows of Markdown, and the progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic_files import whole_file
from .errors import SurgicalError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress

NO_FIGURES = "drawing needs matplotlib, which is not installed: pip install 'surgical-peft[experiments]'."


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
    """`| a | b |`."""
    return f"| {' | '.join(cells)} |"


def progress_bar(console: Console, *more: str) -> Progress:
    """A bar with how many of how many and the time since it began.

    Args:
        console: where it is shown.
        more: further columns, texts with `{task...}` of rich.

    Example:
        >>> with progress_bar(Console()) as bar:
        ...     task = bar.add_task("train", total=3)
        ...     bar.advance(task)
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:20}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *map(TextColumn, more), console=console)
