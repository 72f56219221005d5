"""A comparison on text: mails of different lengths, mistyped, and a BERT that reads them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from surgical_peft import SurgicalError
from surgical_peft.experiments.compare.compare import compare
from surgical_peft.experiments.compare.comparison import Job
from surgical_peft.experiments.compare.jobs import JobRunner
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task
from tests.support.cli import QUIET, timeless
from tests.support.toy_tasks import bert, words, write_model

SIZES = {"train": 16, "validation": 24, "test": 40}
METHODS = ["nothing", "full", "head", {"lora": {"rank": 2}}, "layer_decay"]


def write_mails(folder: Path, seed: int) -> str:
    """Mails of two to nine words; spam is what speaks of money."""
    rng = np.random.default_rng(seed)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    for split, size in SIZES.items():
        chosen = [["money" if at % 2 else "noon", *words(rng)] for at in range(size)]
        texts = [" ".join(rng.permutation(each)) for each in chosen]
        data = Dataset.from_dict({"text": texts, "label": [at % 2 for at in range(size)]}, features=features)
        data.to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("mails")
    draws = [write_mails(folder / name, seed) for seed, name in enumerate(("one", "two", "source"))]
    return Recipe(
        model=str(write_model(folder / "model", bert(BertForSequenceClassification, 2))),
        data=draws[0],
        task="text_classification",
        character_noise=30,
        methods=METHODS,
        rates=[1e-2],
        seeds=[0, 1],
        draws=draws[:2],
        source_data={"data": draws[2]},
        training={
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "use_cpu": True,
            "output_dir": str(folder / "run"),
        },
    )


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> dict[str, Any]:
    return compare(recipe, console=QUIET).to_json()


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe.training["output_dir"])


def test_every_method_has_a_row(report: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in report["methods"]}
    assert list(rows) == ["no adaptation", "full fine-tuning", "head", "LoRA r=2", "layer decay 0.75"]
    for row in rows.values():
        assert len(row["test"]) == len(row["forgotten"]) == 2
        assert all(round(value * SIZES["test"], 6).is_integer() for value in row["test"])
    head = (16 * 16 + 16) + (16 * 2 + 2)  # pooler and classifier
    assert rows["head"]["tuned_parameters"] == [head, head]
    of_layer = 4 * (16 + 16) + 2 * (16 + 32)  # inputs and outputs of query, key, value, output, and of the MLP
    assert set(rows["LoRA r=2"]["tuned_parameters"]) == {head + 2 * 2 * of_layer}
    assert rows["no adaptation"]["forgotten"] == [0, 0]


def accuracy(recipe: Recipe, texts: list[str], labels: list[int]) -> float:
    """Of the model in a recipe, by transformers alone, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(recipe.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    with torch.inference_mode():
        found = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits.argmax().item() for text in texts]
    return float(np.mean(np.array(found) == np.array(labels)))


def test_targets_are_mistyped_and_the_source_is_not(recipe: Recipe, report: dict[str, Any]) -> None:
    shifted = load_task(recipe, ("test",)).splits["test"]
    decode = AutoTokenizer.from_pretrained(recipe.model).decode
    texts = [decode(shifted[at]["input_ids"]) for at in range(SIZES["test"])]
    assert any("<unk>" in text for text in texts)
    test = report["methods"][0]["test"][0]
    assert test == pytest.approx(accuracy(recipe, texts, [shifted[at]["labels"] for at in range(SIZES["test"])]))
    source = load_dataset(recipe.source_data["data"], split="test")
    (finding,) = folder_of(recipe).glob("runs/source-*.json")
    told = json.loads(finding.read_text())["found"]["on_source"]
    assert told == pytest.approx(accuracy(recipe, list(source["text"]), list(source["label"])))


def test_what_is_lost_is_made_again_and_no_more(
    recipe: Recipe, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash: the trainings of one method and all tests of one seed are gone."""
    shutil.copytree(folder_of(recipe) / "runs", tmp_path / "runs")
    lost = 0
    for path in (tmp_path / "runs").iterdir():
        asked = json.loads(path.read_text())["asked"]
        is_lost = "lora" in asked["method"] if asked["kind"] == "training" else asked.get("seed") == 1
        if asked["kind"] in ("training", "test") and is_lost:
            path.unlink()
            lost += 1
    assert lost == 2 + len(METHODS)
    done: list[Job] = []
    do = JobRunner.do
    monkeypatch.setattr(JobRunner, "do", lambda job_runner, job: done.append(job) or do(job_runner, job))  # type: ignore[func-returns-value]
    assert timeless(compare(recipe, tmp_path, console=QUIET).to_json()) == timeless(report)
    assert len(done) == lost


# Bad input


def changed(folder: Path, recipe: Recipe, split: str, change: Any) -> str:
    """A copy of the data with one split changed."""
    shutil.copytree(recipe.data, folder)
    data = load_dataset(recipe.data, split=split)
    change(data).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def emptied(data: Any) -> Any:
    return data.map(lambda row, at: {"text": " " if at in (3, 5) else row["text"]}, with_indices=True)


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", emptied, "train.*text has 2 empty cells, rows 3, 5 of 16"),
        ("test", emptied, "test.*text has 2 empty cells, rows 3, 5 of 40"),
        ("train", lambda data: data.filter(lambda row: row["label"] == 1), "8 rows.*train.*label 1"),
        ("test", lambda data: data.rename_column("label", "lable"), "train.*'lable'.*'label'"),
    ],
)
def test_a_draw_that_does_not_fit(split: str, change: Any, message: str, recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.draws is not None
    wrong = replace(recipe, draws=[recipe.draws[0], changed(tmp_path / "data", recipe, split, change)])
    with pytest.raises(SurgicalError, match=message):
        compare(wrong, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"columns": {"text": "txet"}}, "'txet'.*'text'"),
        ({"columns": {"lable": "label"}}, "'lable'.*'label'"),
        ({"source_data": {"data": "one", "character_nois": 3}}, "'character_noise'"),
        ({"label_map": {"spam": 1, "hamm": 0}}, "hamm"),
        ({"character_noise": 0}, "character_noise=0"),
    ],
)
def test_a_recipe_that_does_not_fit(keys: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=message):
        compare(replace(recipe, **keys), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
