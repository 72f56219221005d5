"""The classes of a column, by their names or numbers."""

from __future__ import annotations

import pyarrow as pa
import pytest
from datasets import ClassLabel, Value

from surgical_peft.experiments.tasks.labels import class_names


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        ([0, 1, 2, 0], ["0", "1", "2"]),
        ([4, 0, 1], ["0", "1", "2", "3", "4"]),  # a few examples of a data set with five classes
        ([1, 5, 3, None], ["1", "3", "5"]),  # stars
        ([0, 10**9], ["0", "1000000000"]),  # an id takes no memory
        ([-1, 1], ["-1", "1"]),
        (["b", "a", None], ["a", "b"]),
    ],
)
def test_classes_of_a_column(cells: list[int | str | None], classes: list[str]) -> None:
    column = pa.chunked_array([cells])
    kind = "string" if isinstance(cells[0], str) else "int64"
    assert class_names(Value(kind), column) == classes


def test_named_classes_are_all_there_whatever_the_rows_hold() -> None:
    assert class_names(ClassLabel(names=["no", "yes"]), pa.chunked_array([[1]])) == ["no", "yes"]
