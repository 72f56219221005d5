"""`surgical-peft start`: what it understands of a model and data, and a recipe that `train` takes as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image
from transformers import BertForSequenceClassification

from surgical_peft import SurgicalError
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.start import start as starting
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.cost import Timing
from tests.support import tiny
from tests.support.cli import run
from tests.support.toy_tasks import TOY_TASKS, bert, write_model

TIMING = Timing(whole=10.0, last=4.0, step=0.1, measure=1.0, start=2.0, memory=10**9)


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "time_trainings", lambda recipe, runner: TIMING)


def started(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    data: str,
    *arguments: str,
) -> dict[str, Any]:
    """What the command prints as JSON; the recipe is in the folder."""
    monkeypatch.chdir(folder)
    capsys.readouterr()
    assert run(monkeypatch, "start", model, data, "--recipe", "mine/recipe.yaml", "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_images_without_a_split_become_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_model(tmp_path / "a model")
    tiny.write_data(tmp_path / "data", ("train", "test"))
    said = started(tmp_path, monkeypatch, capsys, "a model", "data")
    assert said["task"] == "image_classification" and "2 layers" in said["model"] and not said["reasons"]
    assert any("held out" in line or "validation" in line for line in said["data"])
    seconds = said["seconds"]
    assert list(seconds) == ["score", "train", "advise", "search", "compare"]
    assert seconds["score"] < seconds["train"] < seconds["advise"] < seconds["compare"]
    recipe = load_recipe(tmp_path / "mine" / "recipe.yaml")
    assert Path(recipe.model) == tmp_path / "a model" and recipe.blocks == "auto"
    assert set(load_task(recipe).splits) == {"train", "validation", "test"}


@pytest.mark.parametrize(
    ("header", "arguments", "task"),
    [
        ("id,review,stars", (), "text_classification"),
        ("id,text,stars", (), "causal_lm"),
        ("id,text,label", (), "text_classification"),
        ("id,text,stars", ("--column", "label=stars"), "text_classification"),
    ],
)
def test_classes_in_a_table_are_seen_also_where_the_model_is_of_language(
    header: str,
    arguments: tuple[str, ...],
    task: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A column with another number in each row is none of them."""
    TOY_TASKS["causal_lm"](tmp_path / "toy")
    rows = [f"{at},money at noon {at},{1 + at % 3}" for at in range(60)]
    (tmp_path / "reviews.csv").write_text("\n".join([header, *rows]) + "\n")
    said = started(tmp_path, monkeypatch, capsys, "toy/model", "reviews.csv", *arguments)
    assert said["task"] == task
    if task != "causal_lm":
        assert said["keys"]["new_head"] and any("not used: id" in line for line in said["data"])
        keys = load_recipe(tmp_path / "mine" / "recipe.yaml")
        assert keys.columns == dict(pair.split("=") for pair in arguments[1:])


def test_images_that_pandas_wrote_are_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    TOY_TASKS["image_classification"](tmp_path / "toy")
    rows = Dataset.from_parquet(str(tmp_path / "toy" / "data" / "train.parquet"))
    stored = rows.cast_column("image", Image(decode=False))
    table = pa.table({"image": pa.array(stored["image"][:]), "label": list(rows["label"])})
    pq.write_table(table, tmp_path / "images.parquet")
    assert started(tmp_path, monkeypatch, capsys, "toy/model", "images.parquet")["task"] == "image_classification"


def test_a_table_of_texts_whose_classes_are_others_gets_a_new_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", bert(BertForSequenceClassification, 2))
    rows = [f"money and noon,{('good', 'bad', 'ugly')[at % 3]}" for at in range(60)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    said = started(tmp_path, monkeypatch, capsys, "model", "reviews.csv")
    assert said["task"] == "text_classification" and list(said["reasons"]) == ["new_head"]
    assert load_recipe(tmp_path / "mine" / "recipe.yaml").new_head


def test_it_says_what_comes_next_and_replaces_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_model(tmp_path / "model")
    tiny.write_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "start", "model", "data") == 0
    shown = capsys.readouterr().out
    assert all(f"surgical-peft {command} recipe.yaml" in shown for command in ("train", "advise", "compare"))
    assert "1.0 GB" in shown and max(map(len, shown.splitlines())) <= 80
    written = (tmp_path / "recipe.yaml").read_text()
    assert run(monkeypatch, "start", "model", "data") == 2 and "recipe.yaml" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == written


@pytest.mark.parametrize("name", ["2024", "null", "1e-3", "a #b: c", "Fotos/Bücher 📚"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path / name, tmp_path / "data"):
        folder.mkdir(parents=True)
    recipe = Recipe(
        model=str(tmp_path / name),
        data=str(tmp_path / "data"),
        rates=[1e-3],
        training={"learning_rate": 1e-3, "num_train_epochs": 3, "per_device_train_batch_size": 16},
    )
    start = starting.Start(recipe, {}, "a model", ["labels: one\ntwo, three"], [], 0)
    path = tmp_path / "recipe.yaml"
    path.write_text(starting.recipe_text(start, path), encoding="utf-8")
    assert Path(load_recipe(path).model) == tmp_path / name


def test_data_that_fit_no_model_are_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "model", bert(BertForSequenceClassification, 2))
    (tmp_path / "numbers.csv").write_text("a,b\n1.5,2.5\n2.5,3.5\n")
    with pytest.raises(SurgicalError, match=r"numbers\.csv"):
        starting.start(str(tmp_path / "model"), str(tmp_path / "numbers.csv"))
