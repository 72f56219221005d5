"""Three pages that begin with raw files and end with a prediction, run by copy and paste."""

from __future__ import annotations

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

from tests.support.cli import run

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def follow(page: str, folder: Path, patch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """Do what a page says from top to bottom in an empty folder with the shipped recipes.

    Python runs, a YAML block becomes the file that its first line names, and commands are given as they stand. Returns
    what the last Python block left behind, and all that was printed.
    """
    patch.chdir(folder)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    left: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()) as printed:
        for kind, code in FENCED.findall((ROOT / "docs" / page).read_text(encoding="utf-8")):
            if kind == "python":
                left = {"__name__": "__main__"}
                exec(code, left)
            elif kind == "yaml":
                Path(code.split()[1]).write_text(code, encoding="utf-8")
            else:
                for command in code.splitlines():
                    assert run(patch, *shlex.split(command)[1:]) == 0, command
    return left, printed.getvalue()


def test_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, _ = follow("folder_of_images.md", tmp_path, monkeypatch)
    report = left["report"]
    assert report["before"]["test"] < 0.5 and report["after"]["test"] > 0.9
    assert next(iter(left["answers"][0].labels)) == "sandal"
    card = Path("runs/photos/adapter/README.md")
    assert metadata_load(card)["pipeline_tag"] == "image-classification"
    assert "```python\nfrom transformers import pipeline" not in card.read_text()  # which makes RGB of gray images
    assert Path("merged/preprocessor_config.json").is_file()


def test_a_csv_of_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, _ = follow("csv_of_reviews.md", tmp_path, monkeypatch)
    report = left["report"]
    assert report["before"]["validation"] < 0.4 and report["after"]["validation"] > 0.95
    assert [answer["label"] for answer in left["answers"]] == ["bad", "good"]


def test_a_jsonl_of_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, printed = follow("jsonl_of_chats.md", tmp_path, monkeypatch)
    assert left["answer"][0]["generated_text"][-1]["content"] == "five"
    before, after = re.findall(r"loss ([\d.]+) before, ([\d.]+) after", printed)[0]
    assert float(after) < 0.3 * float(before)
    assert Path("runs/chats/adapter/tokenizer.json").is_file()
