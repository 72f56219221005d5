"""What `make real-data` writes: no problem twice, notes left out, and what is missing or changed is told."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "recipes" / "real" / "make_gsm8k.py"))


def rows(count: int, kind: str) -> list[dict[str, str]]:
    answer = "She has 2+{0}=<<2+{0}=9>>9{1}.\n#### 9"
    return [{"question": f"{kind} {at}?", "answer": answer.format(at, " more" * (at % 3) * 40)} for at in range(count)]


def test_problems_are_drawn_once_and_by_seed(script: dict[str, Any]) -> None:
    splits = script["draw"]({"train": rows(900, "a"), "test": rows(460, "b")})
    assert {split: len(drawn) for split, drawn in splits.items()} == {"train": 480, "validation": 40, "test": 300}
    prompts = [row["prompt"] for drawn in splits.values() for row in drawn]
    assert len(set(prompts)) == len(prompts) and all("b " in row["prompt"] for row in splits["test"])
    for drawn in splits.values():
        sizes = [len(row["prompt"]) + len(row["completion"]) for row in drawn]
        assert sizes == sorted(sizes) and sizes[-1] <= script["LONGEST"]
        assert all("<<" not in row["completion"] and row["completion"].endswith("\n#### 9") for row in drawn)
    assert script["draw"]({"train": rows(900, "a"), "test": rows(460, "b")}) == splits
    with pytest.raises(SystemExit, match="too few"):
        script["draw"]({"train": rows(300, "a"), "test": rows(460, "b")})


def test_passages_are_whole_paragraphs_of_different_chapters(script: dict[str, Any]) -> None:
    chapters = [f"first {at}\n\n" + "\n\n".join([f"{at} " + "sea " * 100] * 5) for at in range(40)]
    made = script["passages"](chapters)
    assert len(made) == 24 and len({row["text"].split()[0] for row in made}) == 24
    assert all(700 <= len(row["text"]) < 1400 and "first" not in row["text"] for row in made)


def test_a_folder_that_is_missing_is_told_with_what_makes_it(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_gsm8k.py", str(tmp_path / "none"), str(tmp_path)])
    with pytest.raises(SystemExit, match=r"make real-data.*openai/gsm8k"):
        script["main"]()
    assert not (tmp_path / "gsm8k").exists()


def test_what_is_there_is_kept(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    for folder in (source, tmp_path / "prose"):
        folder.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows(900, split))))
    monkeypatch.setattr(sys, "argv", ["make_gsm8k.py", str(source), str(tmp_path)])
    script["main"]()
    written = (tmp_path / "gsm8k" / "test.jsonl").read_text()
    (source / "test.jsonl").unlink()
    script["main"]()
    assert (tmp_path / "gsm8k" / "test.jsonl").read_text() == written and not list((tmp_path / "prose").iterdir())


def test_a_wheel_that_changed_is_refused(tmp_path: Path) -> None:
    models = runpy.run_path(str(ROOT / "benchmarks" / "real_models.py"))
    (tmp_path / "wheel").write_bytes(b"another")
    found = hashlib.sha256(b"another").hexdigest()
    for name, digest in models["SHA256"].items():
        with pytest.raises(SystemExit, match=f"{name}.*{found}.*{digest}"):
            models["checked"](tmp_path / "wheel", name)
