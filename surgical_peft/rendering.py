"""Figures that are written whole, rows of Markdown, times for people, and the progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .atomic_files import whole_file
from .errors import SurgicalError

if TYPE_CHECKING:
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


def markdown_row(cells: Sequence[str]) -> str:
    """`| a | b |`."""
    return f"| {' | '.join(cells)} |"


def progress_bar(console: Console) -> Progress:
    """A bar with the time since it began and the time that is left, in 80 columns; it goes away at its end.

    Args:
        console: where it is shown. Its tasks have the fields `count`, `clock` and `note`, which are texts.

    Example:
        >>> with progress_bar(Console(stderr=True)) as bar:
        ...     task = bar.add_task("train", total=3, count="0 of 3", clock="", note="")
        ...     bar.update(task, completed=1, count="1 of 3")
    """
    from rich.progress import BarColumn, Progress, TextColumn

    texts = ("{task.description}", "{task.fields[count]}", "{task.fields[clock]}", "{task.fields[note]}")
    words, *others = (TextColumn(text, markup=False) for text in texts)
    return Progress(words, BarColumn(10), *others, console=console, transient=True)


def clock(seconds: float) -> str:
    """A time for people: `42 s`, `1:30 min` or `1:02:03 h`.

    Example:
        >>> clock(90)
        '1:30 min'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
