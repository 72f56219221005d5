"""`BlockScores`: the result of `score_blocks`; plain data to print, plot and save as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import criteria
from ..atomic_files import write_text
from ..blocks.block_map import blocks_in_words, kind_of
from ..criteria.criterion import GIVEN_UP, GUESSED, range_of
from ..errors import SurgicalError, first_of
from ..rendering import TextTable
from ..typed_json import JsonReader, parse_json, read_json
from ..validation import check_choice

_REMEDY = "score the blocks again, and save() the scores"
_JSON = JsonReader("the JSON of block scores", _REMEDY)
MARKS = {GIVEN_UP: "~", GUESSED: "?"}
LEGEND = {
    GIVEN_UP: "given up after a shorter training than that of the best, and capped at their lowest score",
    GUESSED: "never trained: guessed from gradients",
}


@dataclass(frozen=True)
class BlockScores:
    """Scores of a model's blocks (or modules, or tensors), larger = tune it.

    Attributes:
        values: raw score of each unit, in the order of the model.
        sizes: number of parameters of each unit.
        blocks: the block that each unit belongs to.
        unscored: units left out because their weights are all zero, the loss reaches none of them, or the criterion
            does not define a score of them.
        criterion, granularity, num_batches, model_name: the settings of the scoring.
        layer_paths: those of the `BlockMap`: which modules are the layers, where they were not found but named.
        basis: of units whose score is no measurement of their own: `"given up"` early, or `"guessed"`.

    Example:
        >>> scores.values["embeddings"]
        0.31
        >>> scores.plot("scores.png")
    """

    values: dict[str, float]
    sizes: dict[str, int]
    blocks: dict[str, str]
    unscored: tuple[str, ...]
    criterion: str
    granularity: str
    num_batches: int
    model_name: str
    layer_paths: tuple[str, ...] = ()
    basis: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = ", ".join(f"{name} ({value})" for name, value in self.values.items() if not math.isfinite(value))
        if wrong:
            raise SurgicalError(f"scores that are NaN or infinite can be neither ranked nor saved: {wrong}.")

    def normalized(self, how: str = "max") -> dict[str, float]:
        """Scores between 0 and 1 (`"max"`: divided by the largest; `"minmax"`: smallest 0, largest 1).

        The head's units stay outside: a head has large gradients and small weights and would squash all others. They
        get 1.0.

        Raises:
            SurgicalError: unknown `how`, all scores are zero, or `"max"` of scores below zero.
        """
        others = {name: value for name, value in self.values.items() if kind_of(self.blocks[name]) != "head"}
        return {**dict.fromkeys(self.values, 1.0), **normalize(others, how)}

    def table(self) -> TextTable:
        """A table of unit, parameters, score and a bar, which prints anywhere and fits the terminal."""
        high = max(0.0, *self.values.values())
        low = max(min(0.0, *self.values.values()), -high if high else -math.inf)  # of -14 a bar says little
        length = 20 / ((high - low) or 1.0)
        below = round(-low * length)  # characters left of zero
        rows = [
            [
                blocks_in_words([name]) if self.granularity == "block" else name,
                f"{self.sizes[name]:,}",
                f"{value:.4g}{MARKS.get(self.basis.get(name, ''), ' ')}",
                ("█" * round(-max(value, low) * length)).rjust(below)
                if value < 0
                else " " * below + "█" * round(value * length),
            ]
            for name, value in self.values.items()
        ]
        title = f"{self.criterion} of {self.model_name}, mean of {self.num_batches} batches"
        return TextTable(title, [self.granularity, "parameters", "score", ""], rows, self._notes(), left=(0, 3))

    def _notes(self) -> list[str]:
        """What the scores mean."""
        notes = [f"Score: higher = tune it first; {_range_of(self.criterion)}."]
        marked = set(self.basis.values())
        notes += [f"{mark} {LEGEND[basis]}" for basis, mark in MARKS.items() if basis in marked]
        if max(self.values.values()) < 0:
            notes.append("All scores are below zero: no block looks worth tuning, the highest is the least bad.")
        if self.unscored:
            notes.append(f"Without a score: {', '.join(self.unscored)}.")
        return notes

    def __str__(self) -> str:
        return str(self.table())

    def to_json(self) -> str:
        """The scores as JSON; [`from_json`][surgical_peft.BlockScores.from_json] gives them back equal."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> BlockScores:
        """Scores from their JSON.

        Raises:
            SurgicalError: not JSON, or not that of scores.
        """
        return cls._from_values(parse_json(text, "the JSON of block scores", _REMEDY))

    def save(self, path: str | Path) -> None:
        """Write the JSON to `path`, whole or not at all."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> BlockScores:
        """Read what [`save`][surgical_peft.BlockScores.save] wrote."""
        return cls._from_values(read_json(path, _REMEDY))

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> BlockScores:
        if unknown := values.keys() - {entry.name for entry in fields(cls)}:
            raise SurgicalError(f"{_JSON.file} has {first_of(sorted(unknown))}, which no scores have: {_REMEDY}.")
        scores = _JSON.read(cls, values)
        units = scores.sizes.keys()
        known = scores.values.keys() <= units == scores.blocks.keys() <= {*scores.values, *scores.unscored}
        if not scores.values or not known:
            raise SurgicalError(f"block scores without a size and a block for each unit: {_REMEDY}.")
        return scores

    def plot(self, path: str | Path) -> None:
        """Draw the scores as bars, first block at the top, and write them to `path` (png, pdf or svg)."""
        from .plot import plot_scores

        plot_scores({"": self}, path)


def normalize(values: dict[str, float], how: str) -> dict[str, float]:
    """`"max"`: each value divided by the largest (the paper's code). `"minmax"`: smallest to 0, largest to 1."""
    check_choice("the scores", "normalize", how, ("max", "minmax"))
    if not values:
        return {}
    low, high = min(values.values()), max(values.values())
    if low == high == 0:
        raise SurgicalError("all scores are zero: the loss does not depend on these blocks, so they do not compare.")
    if how == "max":
        if low < 0:
            raise SurgicalError(f"the lowest score is {low:.4g}; below zero 'max' has no meaning: use 'minmax'.")
        return {name: value / high for name, value in values.items()}
    if high == low:
        return dict.fromkeys(values, 1.0)
    return {name: (value - low) / (high - low) for name, value in values.items()}


def _range_of(criterion: str) -> str:
    known = getattr(criteria, criterion) if criterion in criteria.__all__ else None
    return (known and range_of(known)) or "its unit is the criterion's own"
