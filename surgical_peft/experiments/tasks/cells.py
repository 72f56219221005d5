"""The cells of a column: which are empty, too long, or cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Image
from PIL import Image as PILImage

from .summary import listed

LONGEST = 10**7  # characters of a text; a tokenizer reads all of it before it cuts
_BATCH = 1000  # images in memory
_UNREADABLE: dict[tuple[str, str], dict[int, str]] = {}  # what a check of all images of a data set said


@dataclass(frozen=True)
class Fault:
    """Rows of a split whose cell in one column cannot be used.

    Attributes:
        problem: of the cells, with `{s}` for the plural.
        rows: their places, from 0.
        details: of some rows, such as paths.
    """

    problem: str
    rows: np.ndarray
    details: tuple[str, ...] = ()

    def describe(self, column: str, count: int) -> str:
        """The fault in words; `count` is the number of rows of the split."""
        number, s = len(self.rows), "s" * (len(self.rows) > 1)
        details = f": {'; '.join(self.details)}" if self.details else ""
        if number == count:
            return f"column {column} has {self.problem.format(s='s')} in all {count:,} rows{details}"
        rows = f"row{s} {listed(self.rows.tolist())} of {count:,}"
        return f"column {column} has {number:,} {self.problem.format(s=s)}, {rows}{details}"


def cells_of(rows: Any, column: str) -> pa.ChunkedArray:
    """A column of a data set as Arrow has it; images are not decoded."""
    cells = rows.data.column(column)
    selected = rows._indices  # datasets gathers selected rows one by one, which takes seconds for a million
    return cells if selected is None else cells.take(selected.column(0))


def empty_cells(rows: Any, column: str) -> list[Fault]:
    """The cells with nothing in them."""
    return _faults({"empty cell{s}": pc.is_null(cells_of(rows, column), nan_is_null=True)})


def text_faults(rows: Any, column: str) -> list[Fault]:
    """Texts that are missing, of white space alone, or beyond all measure."""
    cells = cells_of(rows, column)
    if not is_text(cells.type):  # a column without any text
        return empty_cells(rows, column)
    too_long = pc.greater(pc.utf8_length(cells), LONGEST)
    return _faults({"empty cell{s}": _is_blank(cells), f"text{{s}} of more than {LONGEST:,} characters": too_long})


def label_faults(rows: Any, column: str) -> list[Fault]:
    """Labels that are missing; a `ClassLabel` has -1 for it."""
    cells, feature = cells_of(rows, column), rows.features[column]
    if is_text(cells.type):
        return _faults({"empty cell{s}": _is_blank(cells)})
    if not isinstance(feature, ClassLabel):
        return empty_cells(rows, column)
    return _faults({"empty cell{s}": pc.is_null(cells), "cell{s} without a label (-1)": pc.equal(cells, -1)})


def number_faults(rows: Any, column: str) -> list[Fault]:
    """Numbers that are missing or not finite."""
    is_finite = pc.is_finite(pc.cast(cells_of(rows, column), pa.float64()))
    return _faults({"empty cell{s}": pc.invert(pc.fill_null(is_finite, False))})


def list_faults(rows: Any, column: str) -> list[Fault]:
    """Lists that are missing or empty, or have an empty entry."""
    cells = cells_of(rows, column).combine_chunks()
    if not isinstance(cells, pa.ListArray | pa.LargeListArray):
        return empty_cells(rows, column)
    is_empty = pc.fill_null(pc.equal(pc.list_value_length(cells), 0), True)
    entries = pc.list_flatten(cells)
    is_bad = _is_blank(entries) if is_text(entries.type) else pc.is_null(entries)
    parents = np.unique(pc.list_parent_indices(cells).filter(is_bad).to_numpy(zero_copy_only=False))
    faults = _faults({"empty cell{s}": is_empty})
    return [*faults, Fault("list{s} with an empty entry", parents)] if len(parents) else faults


def image_faults(rows: Any, column: str) -> list[Fault]:
    """Images that are missing, or that cannot be read; each is read once for a process."""
    faults = empty_cells(rows, column)
    key = rows._fingerprint, column
    if key not in _UNREADABLE:
        _UNREADABLE[key] = _read_all(rows, column)
    unreadable = _UNREADABLE[key]
    if unreadable:
        places = np.array(sorted(unreadable))
        details = [unreadable[place] for place in places[:5].tolist()]
        faults.append(Fault("image{s} that cannot be read", places, tuple(filter(None, details))))
    return faults


def _read_all(rows: Any, column: str) -> dict[int, str]:
    stored = rows.select_columns(column).cast_column(column, Image(decode=False))
    unreadable: dict[int, str] = {}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow decodes outside Python's lock
        for start in range(0, len(stored), _BATCH):
            cells = stored[start : start + _BATCH][column]
            for place, reason in enumerate(pool.map(partial(_why_unreadable, Image()), cells), start):
                if reason is not None:
                    unreadable[place] = reason
    return unreadable


def _why_unreadable(feature: Image, cell: Mapping[str, Any] | None) -> str | None:
    if cell is None:
        return None
    try:
        is_fraction = feature.decode_example(dict(cell)).mode == "F"
        reason = "floating point pixels, whose range is not known: save it with 8 or 16 bits" if is_fraction else None
    except (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError) as error:
        reason = str(error).partition(" <_io.")[0].partition(" '/")[0]  # not the address of the open file
    return f"{cell['path']} ({reason})" if reason and cell["path"] else reason


def is_text(kind: pa.DataType) -> bool:
    """True for a column of texts, as Arrow has it."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_blank(cells: Any) -> Any:
    return pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(cells)), 0), True)


def _faults(problems: Mapping[str, Any]) -> list[Fault]:
    places = {problem: np.flatnonzero(np.asarray(pc.fill_null(mask, False))) for problem, mask in problems.items()}
    return [Fault(problem, rows) for problem, rows in places.items() if len(rows)]
