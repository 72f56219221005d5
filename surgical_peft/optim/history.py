"""The record of a policy's factors over a training, and its picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_files import write_text
from ..rendering import new_figure

Row = dict[str, Any]


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

    The second is panel C of the poster of BVG-LS.
    """
    blocks = list(rows[0]["lr_multiplier"])
    values = np.array([[row["lr_multiplier"][block] for row in rows] for block in blocks])
    starts = [row["step"] for row in rows]
    lengths = np.diff([*starts, max(steps, starts[-1]) + 1])
    shares = (values > 0) @ lengths / lengths.sum()
    with new_figure(path, 10, 1.6 + 0.28 * len(blocks)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
        mesh = left.imshow(
            np.repeat(values, lengths, axis=1),
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=max(1.0, values.max()),
            interpolation="nearest",
            extent=(starts[0] - 0.5, starts[0] + lengths.sum() - 0.5, len(blocks) - 0.5, -0.5),
        )
        figure.colorbar(mesh, ax=left, label="factor on the learning rate", pad=0.01)
        left.set_yticks(range(len(blocks)), blocks)
        left.set_xlabel("optimizer step")
        left.set_ylabel("block")
        left.set_title(title, fontsize=10)
        bars = right.barh(range(len(blocks)), 100 * shares, color="#4477aa")
        right.bar_label(bars, fmt="{:.0f}", padding=3, fontsize=8)
        right.set_xlim(0, 115)
        right.set_xticks([0, 50, 100])
        right.set_xlabel("steps trained, %")
        right.set_title("how often selected", fontsize=10)
        right.spines[["top", "right"]].set_visible(False)
        right.tick_params(axis="y", labelleft=False)
