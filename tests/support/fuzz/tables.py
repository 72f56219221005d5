"""Tables of any columns and cells: what is read gives each row the label of its class, and loses no row."""

from __future__ import annotations

import csv
import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from surgical_peft import SurgicalError
from surgical_peft.experiments.recipe import recipe_of
from surgical_peft.experiments.tasks import load_task
from tests.support.toy_tasks import TOY_TASKS

from .outcomes import Family

_CELLS: list[Any] = [
    *(
        None,
        "",
        " ",
        "now",
        "ham",
        "spam",
        "Ham",
        "é",
        "🦊",
        "\u202e",
        "NA",
        "null",
        "nan",
        "a,b",
        'a"b',
        "a\nb",
        "\0",
    ),
    *(
        0,
        1,
        2,
        -1,
        10**9,
        2**63 - 1,
        2**64,
        10**30,
        0.5,
        1.0,
        1e308,
        math.nan,
        math.inf,
        True,
        False,
        [],
        ["a"],
        {"a": 1},
    ),
]
_KINDS = {
    "texts": st.sampled_from(["now", "win money", "meet us", "free", "é", "🦊", "[/red]", "a,b"]),
    "words": st.sampled_from(["ham", "spam", "Ham", "é"]),
    "numbers": st.integers(-1, 3),
    "ids": st.integers(0, 2**63 - 1),
    "fractions": st.sampled_from([0.0, 1.0, 0.5, 1e30]),
    "anything": st.sampled_from(_CELLS),
    "lists": st.lists(st.sampled_from(["a", "b"]), max_size=2),
    "truths": st.booleans(),
}
_HEADERS = ["text", "label", "body", "y", "", "text ", "labels", "0", "a,b", "é", "[/red]", "\0"]


@st.composite
def _tables(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.sampled_from([0, 2, 12, 25, 25, 25]))
    usual_names = draw(st.integers(0, 3)) > 0
    more = draw(st.integers(0, 3)) == 0 or not usual_names
    names = draw(st.lists(st.sampled_from(_HEADERS), min_size=1, max_size=2)) if more else []
    names[:0] = ["text", "label"] if usual_names else []
    table: dict[str, list[Any]] = {}
    for place, name in enumerate(names):
        usual = ["texts", "words"][place] if place < 2 else "anything"
        cells = _KINDS[usual if draw(st.integers(0, 5)) else draw(st.sampled_from(sorted(_KINDS)))]
        column = draw(st.lists(cells, min_size=count, max_size=count))
        if count and draw(st.integers(0, 4)) == 0:
            column[draw(st.integers(0, count - 1))] = draw(st.sampled_from(_CELLS))
        table[name] = column
    keys = draw(
        st.sampled_from([{}, {"drop_empty": True}, {"columns": {"text": "body"}}, {"columns": {"label": "y"}}])
    )
    return {"format": draw(st.sampled_from(["csv", "jsonl", "parquet"])), "table": table, "keys": keys}


@functools.cache
def _model() -> str:
    return TOY_TASKS["text_classification"](Path(tempfile.mkdtemp(prefix="fuzz-"))).model


def _write(case: dict[str, Any], folder: Path) -> Path:
    path, table = folder / f"rows.{case['format']}", case["table"]
    rows = list(zip(*table.values(), strict=True))
    if case["format"] == "parquet":
        try:
            pq.write_table(pa.table({name: pa.array(cells) for name, cells in table.items()}), path)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise SurgicalError(f"no such table can be: {error}") from error
    elif case["format"] == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(table, row, strict=True))) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([list(table), *rows])
    return path


def check_table(case: dict[str, Any], folder: Path) -> None:
    """Read a table as a text classification; classes and labels are those of its rows, one to one."""
    path = _write(case, folder)
    recipe = recipe_of(
        {
            "model": _model(),
            "data": str(path),
            "task": "text_classification",
            "new_head": True,
            "blocks": [0],
            **case["keys"],
        }
    )
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    try:
        task = load_task(recipe, ("train", "validation"))
    finally:
        datasets.config.HF_DATASETS_CACHE = before
    labels = [int(example["labels"]) for part in task.splits.values() for example in _all(part)]
    count = len(next(iter(case["table"].values())))
    assert len(labels) == count or case["keys"].get("drop_empty"), f"{len(labels)} of {count} rows"
    column = _label_column(case)
    if column is None:
        return
    classes = [_class_of(cell) for cell in column]
    known = [name for name in classes if name is not None]
    if len(labels) == count:
        assert None not in classes, "an empty cell has a label"
        assert sorted(map(classes.count, set(classes))) == sorted(map(labels.count, set(labels))), "classes are mixed"
    else:
        assert len(labels) <= len(known), "more rows than have a class"


def _all(examples: Any) -> list[Any]:
    return [examples[place] for place in range(len(examples))]


def _label_column(case: dict[str, Any]) -> list[Any] | None:
    """The cells with classes, where the table says it: by the recipe or by its name."""
    name = case["keys"].get("columns", {}).get("label", "label")
    return case["table"].get(name)


def _class_of(cell: Any) -> str | None:
    """The class of a cell: its text; None for an empty one. A whole number with a dot is that number."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or not str(cell).strip():
        return None
    if isinstance(cell, str) and cell in ("NA", "null", "nan"):  # in CSV
        return None
    return str(int(cell)) if isinstance(cell, bool | float) and float(cell).is_integer() else str(cell)


FAMILIES = [Family("data tables", _tables(), check_table)]
