"""Every command on one CSV: the same held-out share, told by each, and no test column."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import BertForSequenceClassification

from surgical_peft import SurgicalError
from surgical_peft.experiments.advise.advise import advise
from surgical_peft.experiments.compare.comparison import Comparison
from surgical_peft.experiments.compare.loaded import LoadedData
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.experiments.compare.tables import markdown, sentences
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.search.search import search
from surgical_peft.experiments.training.train import score, train
from tests.support.toy_tasks import bert, words, write_model

HELD_OUT = "no validation split: 20 % of train, seed 0"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("one-file")
    rng = np.random.default_rng(0)
    rows = [f"{' '.join(words(rng))},{('ham', 'spam')[number % 2]}" for number in range(60)]
    (folder / "mails.csv").write_text("\n".join(["text,label", *rows]))
    return Recipe(
        model=str(write_model(folder / "model", bert(BertForSequenceClassification, 2))),
        data=str(folder / "mails.csv"),
        task="text_classification",
        blocks=["head"],
        training={"max_steps": 2, "use_cpu": True, "output_dir": str(folder / "run"), "learning_rate": 1e-3},
    )


def told() -> Console:
    return Console(file=io.StringIO(), width=200)


def text_of(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_train(recipe: Recipe, tmp_path: Path) -> None:
    console = told()
    report = train(recipe, tmp_path, console)
    assert report.before.keys() == report.after.keys() == {"validation"}
    assert report.dataset.examples == {"train": 48, "validation": 12}
    assert HELD_OUT in text_of(console) and "no test split" in text_of(console)
    written = json.loads((tmp_path / "report.json").read_text())
    assert any(line.startswith(HELD_OUT) for line in written["dataset"]["summary"])
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"- {HELD_OUT}" in card and "| validation | 12 |" in card and "| test |" not in card


def test_score(recipe: Recipe) -> None:
    console = told()
    score(replace(recipe, blocks="auto", criterion="random"), console)
    assert HELD_OUT in text_of(console)


def test_search(recipe: Recipe, tmp_path: Path) -> None:
    console = told()
    search(recipe, tmp_path, console=console)
    assert HELD_OUT in text_of(console)


def test_advise(recipe: Recipe, tmp_path: Path) -> None:
    """Of a few rows, a fifth is too little to judge by; by then it is told why it is so few."""
    lines = Path(recipe.data).read_text().splitlines()
    (tmp_path / "few.csv").write_text("\n".join(lines[:11]))
    console = told()
    with pytest.raises(SurgicalError, match="validation"):
        advise(replace(recipe, data=str(tmp_path / "few.csv")), tmp_path, console=console)
    assert HELD_OUT in text_of(console)


def test_compare_tells_validation_results_and_says_so(recipe: Recipe) -> None:
    comparison = Comparison(replace(recipe, methods=["full", "head"]))
    assert comparison.split == "validation"
    data = LoadedData(comparison)
    assert len(data.test_examples(0, comparison.seeds[0])) == 12
    path = Path(__file__).parents[2] / "benchmarks" / "compare" / "headline_noise" / "report.json"
    report = replace(ComparisonReport.from_json(json.loads(path.read_text())), split=comparison.split)
    assert any("no test split" in sentence for sentence in sentences(report))
    assert "Validation accuracy: mean" in markdown(report) and "Test accuracy" not in markdown(report)
