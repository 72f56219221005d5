"""`benchmarks/speed.py`: its floor, what it keeps of a killed run, and its table."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.toys import TOYS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("speed")


def cases(speed: Any) -> list[Any]:
    """As the command's own: two models, and both with checkpointing."""
    last = ("ours, last quarter",)
    words = speed.Case("words", TOYS["llama"].build, (2, 6), last, seconds=0, is_whole=True)
    images = replace(words, title="images", load=TOYS["vit"].build, inputs=(2, 3, 8, 8), methods=(speed.AUTO_RGN,))
    saving = replace(words, checkpointing=True, is_whole=False)
    return [words, images, saving, replace(saving, title="images", load=images.load, inputs=images.inputs)]


@pytest.mark.parametrize(
    ("method", "first", "tuned"),
    [
        ("full", 0, 12),
        ("ours, first quarter", 0, 3),
        ("ours, middle quarter", 4, 3),
        ("ours, last quarter", 9, 3),
        ("stock PEFT, last quarter", 9, 3),
        ("LoRA r=16, all linear", 0, 0),
    ],
)
def test_the_floor_counts_what_has_gradients(speed: Any, method: str, first: int, tuned: int) -> None:
    training = speed.Training(cases(speed)[1], method, "cpu")
    assert training.step()[1] == pytest.approx((12 + 12 - first + tuned) / 36)


def test_the_floor_follows_blocks_that_change(speed: Any) -> None:
    training = speed.Training(cases(speed)[1], "BAdam", "cpu")
    assert len({training.step()[1] for _ in range(6)}) > 1


def test_measures_what_is_missing_and_writes_the_table(speed: Any, tmp_path: Path, capsys: Any) -> None:
    known, path = cases(speed), tmp_path / "work" / "lines.jsonl"
    speed.run(path, known, "cpu", 0)
    assert len(path.read_text().splitlines()) == 1  # no time: the versions alone
    speed.run(path, known, "cpu", 5)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4 + 4
    path.write_text("".join(lines)[:-20])  # killed while it wrote the last line
    capsys.readouterr()
    speed.run(path, known, "cpu", 5)
    assert capsys.readouterr().out.strip() == json.loads(lines[-1])["key"]
    speed.write(path, known, tmp_path, "cpu")
    table = (tmp_path / "table.md").read_text()
    assert (
        all((bar.measure in table) is (bar.key in path.read_text()) for bar in speed.bars(known))
        and (tmp_path / "steps.png").stat().st_size
    )
    path.write_text(lines[0].replace("torch", "other") + "".join(lines[1:]))
    with pytest.raises(SystemExit, match="delete it"):
        speed.run(path, known, "cpu", 5)
