from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from surgical_peft import SurgicalError
from surgical_peft.typed_json import JsonReader, to_json


@dataclass(frozen=True)
class Inner:
    class_: str
    values: dict[str, float]


@dataclass(frozen=True)
class Outer:
    name: str | None
    count: int
    is_whole: bool
    rest: Any
    inner: Inner
    several: list[Inner]


GOOD: dict[str, Any] = {
    "name": None,
    "count": 3,
    "is_whole": True,
    "rest": {"any": [None]},
    "inner": {"class": "A", "values": {"x": 1}},
    "several": [{"class": "B", "values": {}}],
}
READER = JsonReader("file.json", "write it again")


def test_what_is_written_is_read_back() -> None:
    record = READER.read(Outer, GOOD)
    assert record.several == [Inner("B", {})] and record.inner.class_ == "A"
    assert json.dumps(to_json(record)) == json.dumps(GOOD)
    assert READER.read(Outer, {**GOOD, "of a later version": 1}) == record


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"name": 3}, "name"),
        ({"name": ""}, "name"),
        ({"count": True}, "count"),
        ({"count": None}, "count"),
        ({"count": float("nan")}, "count"),
        ({"is_whole": 1}, "is_whole"),
        ({"inner": []}, "inner"),
        ({"inner": {"class": "A"}}, r"inner\.values"),
        ({"inner": {"class": "A", "values": {"x": "1"}}}, r"inner\.values\.x"),
        ({"several": {}}, "several"),
        ({"several": [{"values": {}}]}, r"several\.class"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], path: str) -> None:
    with pytest.raises(SurgicalError, match=rf"\b{path}\b.*write it again"):
        READER.read(Outer, {**GOOD, **change})
    (key,) = change
    with pytest.raises(SurgicalError, match=f"has no {key}"):
        READER.read(Outer, {name: value for name, value in GOOD.items() if name != key})
