from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from surgical_peft import SurgicalError
from surgical_peft.typed_json import JsonReader, read_json, to_json


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


def test_alternatives_tuples_and_anything() -> None:
    assert READER.read(tuple[str, ...], ["a", "b"]) == ("a", "b")
    assert READER.read(int | list[float] | None, [1, 0.5]) == [1, 0.5]
    for kind, wrong in ((int | list[float], ["x"]), (Any, {"a": [math.nan]}), (int, 2.0), (float, 10**400), (str, 5)):
        with pytest.raises(SurgicalError, match="write it again"):
            READER.read(kind, wrong, "key")


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"5", b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b"\xff"],
    ids=range(8),
)
def test_what_is_no_dictionary_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(SurgicalError, match="write it again"):
        read_json(tmp_path / "file.json", "write it again")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "none", "a\0b", "."):
        with pytest.raises(SurgicalError, match="write it again"):
            read_json(tmp_path / name, "write it again")


def test_a_message_is_for_a_reader() -> None:
    with pytest.raises(SurgicalError, match=r"name is 'xxx.*characters more.*write it again") as caught:
        READER.read(int, "x" * 10**7, "name")
    assert len(str(caught.value)) < 5000
