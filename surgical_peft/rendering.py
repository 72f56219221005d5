"""What all pictures and tables of the package share: a figure that is written whole, and a row of Markdown."""

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

NO_FIGURES = "drawing needs matplotlib, which is not installed: pip install 'surgical-peft[experiments]'."


def can_draw() -> bool:
    """Whether matplotlib is installed."""
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
