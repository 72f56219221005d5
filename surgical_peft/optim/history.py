"""The record of a policy's factors over a training, and its picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic_files import write_text
from ..rendering import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
_FEW = 4  # blocks whose factors are drawn as lines
_COLORS = ("#4477aa", "#cc6677", "#117733", "#ddaa33")


class History:
    """A file with a line of JSON for each step at which a factor changed: `{"step": 1, "lr_multiplier": {"0": 0.5}}`.

    A line holds until the next one. It is written at once, so a killed run loses none but perhaps the one being
    written; lines after the step from which a run starts are dropped, so that a resumed run has the file that an
    uninterrupted one has.

    Args:
        path: where it is or is to be.
        step: steps done when the run starts or resumes.

    Example:
        >>> history = History("run/surgical_history.jsonl", step=0)
        >>> history.note(1, {"0": 0.5, "head": 1.0})
    """

    def __init__(self, path: str | Path, step: int) -> None:
        self.path = Path(path)
        self.rows = [row for row in read_history(self.path) if row["step"] <= step] if step else []
        if self.rows or self.path.exists():
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def note(self, step: int, factors: Mapping[str, float]) -> None:
        """Add a line for this step, unless its factors are those of the last one."""
        rounded = {block: float(f"{factor:.6g}") for block, factor in factors.items()}
        if self.rows and self.rows[-1]["lr_multiplier"] == rounded:
            return
        self.rows.append({"step": step, "lr_multiplier": rounded})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def plot(self, steps: int, title: str) -> None:
        """Draw all `steps` beside the file, as `.png`."""
        plot_history(self.rows, steps, self.path.with_suffix(".png"), title)


def read_history(path: str | Path) -> list[Row]:
    """The lines of a history; none if there is no file. A last line that was cut off by a kill is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_history(rows: Sequence[Row], steps: int, path: str | Path, title: str) -> None:
    """Two panels: the factor of each block at each of `steps` steps, and the share of steps at which it was above 0.

    The second is panel C of the poster of BVG-LS. Factors of few blocks are lines, of more the colors of cells.

    Args:
        rows: of the history.
        steps: of the training.
        path: of the picture (png, pdf or svg).
        title: name of the policy.
    """
    blocks = list(rows[0]["lr_multiplier"])
    values = np.array([[row["lr_multiplier"][block] for row in rows] for block in blocks])
    starts = [row["step"] for row in rows]
    lengths = np.diff([*starts, max(steps, starts[-1]) + 1])
    shares = (values > 0) @ lengths / lengths.sum()
    is_few = len(blocks) <= _FEW
    with new_figure(path, 10, 3.6 if is_few else 2.0 + 0.28 * len(blocks)) as figure:
        figure.suptitle(f"Learning rate of each block in training, by the policy {title}", fontsize=11)
        left, right = figure.subplots(1, 2, width_ratios=[3, 1])
        every = np.repeat(values, lengths, axis=1)
        (_draw_lines if is_few else _draw_cells)(left, blocks, every, starts[0])
        left.set_xlabel("optimizer step")
        left.set_title("factor on the learning rate; 0 = frozen", fontsize=10)
        bars = right.barh(range(len(blocks)), 100 * shares, color="#4477aa")
        right.bar_label(bars, fmt="{:.0f}", padding=3, fontsize=8)
        right.set_xlim(0, 115)
        right.set_xticks([0, 50, 100])
        right.set_yticks(range(len(blocks)), blocks)
        right.set_ylim(len(blocks) - 0.5, -0.5)
        right.set_xlabel("steps trained, % of all")
        right.set_ylabel("block, input at the top")
        right.set_title("how often trained", fontsize=10)
        right.spines[["top", "right"]].set_visible(False)


def _draw_lines(axes: Axes, blocks: Sequence[str], values: np.ndarray, start: int) -> None:
    """A line for each block."""
    for number, (block, line) in enumerate(zip(blocks, values, strict=True)):
        steps = np.arange(start, start + len(line) + 1) - 0.5
        look: dict[str, Any] = {"color": _COLORS[number], "linewidth": 2.6 - 0.5 * number}
        axes.stairs(line, steps, baseline=None, label=block, **look)
    axes.set_ylim(0, 1.08 * max(1.0, values.max()))
    axes.set_ylabel("factor, no unit")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="block", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_cells(axes: Axes, blocks: Sequence[str], values: np.ndarray, start: int) -> None:
    """A row of cells for each block."""
    mesh = axes.imshow(
        values,
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=max(1.0, values.max()),
        interpolation="nearest",
        extent=(start - 0.5, start + values.shape[1] - 0.5, len(blocks) - 0.5, -0.5),
    )
    axes.figure.colorbar(mesh, ax=axes, label="factor, no unit", pad=0.01)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_ylabel("block, input at the top")
