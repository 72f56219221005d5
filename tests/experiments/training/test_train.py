from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console

from surgical_peft import BlockScores, SurgicalError
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.report import TrainingReport
from surgical_peft.experiments.training.summary import last_lines, table
from surgical_peft.experiments.training.train import score, train

SHIPPED = Path(__file__).parents[3] / "recipes" / "fashion_mnist"
RECIPE = Recipe(
    model=str(SHIPPED / "vit"),
    data=str(SHIPPED / "target-0"),
    label_map=list(range(9, -1, -1)),
    blocks=[-2, -1],
    training={"learning_rate": 3e-3, "num_train_epochs": 2, "per_device_train_batch_size": 32, "use_cpu": True},
)


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 200 images of each split: enough to learn from, quick to test on."""

    def small(recipe: Recipe) -> Any:
        task = load_task(recipe)
        return replace(task, splits={name: [each[i] for i in range(200)] for name, each in task.splits.items()})

    monkeypatch.setattr("surgical_peft.experiments.training.train.load_task", small)


def test_training_learns_saves_and_reports(tmp_path: Path, small_splits: None) -> None:
    report = train(RECIPE, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report.to_json() == written and TrainingReport.from_json(written) == report
    assert report.blocks == ["4", "5"]
    assert report.all_parameters == 205_962
    assert report.tuned_parameters == 2 * 33_472
    assert report.metric == "accuracy"
    assert report.after["test"] > report.before["test"] + 0.2
    task = load_task(RECIPE)
    model = PeftModel.from_pretrained(task.load_model(), report.adapter)
    assert task.measure(model, [task.splits["test"][i] for i in range(200)]) == report.after["test"]


def test_a_task_that_measures_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a user may be."""

    def only_train(recipe: Recipe) -> Any:
        task = load_task(recipe)
        return replace(task, splits={"train": [task.splits["train"][i] for i in range(32)]})

    monkeypatch.setattr("surgical_peft.experiments.training.train.load_task", only_train)
    report = train(replace(RECIPE, training={**RECIPE.training, "max_steps": 1}), tmp_path / "run")
    assert report.after == {} and report.tuned_parameters == 2 * 33_472
    assert not any("accuracy" in line for line in last_lines(report))
    assert table(report).rows == []


def test_auto_writes_down_why(tmp_path: Path, small_splits: None) -> None:
    recipe = replace(RECIPE, blocks="auto", num_blocks=3, policy="auto_rgn", policy_options={"every": "epoch"})
    told = io.StringIO()
    recipe = replace(recipe, training={**RECIPE.training, "max_steps": 6})
    report = train(recipe, tmp_path, Console(file=told, width=200))
    stages = [
        "load",
        "choosing blocks: at most 3",
        "gradients",
        "choosing blocks: took",
        "measure",
        "train, steps",
        "trained 6 steps",
    ]
    assert all(f"\n{stage}" in "\n" + told.getvalue() for stage in stages)  # a line each
    assert report.selection["cost"]["budget"] == 3 >= report.selection["cost"]["steps"]
    scores = BlockScores.load(tmp_path / "scores.json")
    assert report.selection["scores"] == scores.values
    assert set(report.blocks) == set(sorted(scores.values, key=lambda name: -scores.values[name])[:3])
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


SCRIPT = """
import datasets
import evaluate


class Mine(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"first": float(predictions[0])}
"""


def test_a_metric_beside_the_recipe_is_reported_as_it_is_written(tmp_path: Path, small_splits: None) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text(SCRIPT)
    text = (
        f"model: {RECIPE.model}\ndata: {RECIPE.data}\nblocks: [0]\nmetric: mine:first\nmax_steps: 1\nuse_cpu: true\n"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    assert train(load_recipe(tmp_path / "recipe.yaml", allow_code=True), tmp_path / "run").metric == "mine:first"
    assert str(tmp_path / "mine") not in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_same_seed_same_weights(tmp_path: Path, small_splits: None) -> None:
    recipe = replace(RECIPE, training={**RECIPE.training, "max_steps": 3})
    files = []
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 100)  # whatever the state before
        train(recipe, tmp_path / name)
        files.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_nothing_is_written_when_the_blocks_are_wrong(tmp_path: Path, small_splits: None) -> None:
    with pytest.raises(SurgicalError, match="block 14 "):
        train(replace(RECIPE, blocks=[14]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_replaces_an_older_one_whole(tmp_path: Path, small_splits: None) -> None:
    recipe = replace(RECIPE, training={**RECIPE.training, "max_steps": 1})
    train(recipe, tmp_path)
    (tmp_path / "adapter" / "stale.txt").write_text("old")
    (tmp_path / "scores.json").write_text("of a run with blocks: auto")
    train(recipe, tmp_path)
    assert not (tmp_path / "adapter" / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "report.json"]


def test_a_rate_that_is_too_high_is_said_and_nothing_is_saved(tmp_path: Path, small_splits: None) -> None:
    """Accuracy is a number with NaN weights, too; other metrics led to a card that said `train again`."""
    recipe = replace(RECIPE, training={**RECIPE.training, "learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 4})
    with pytest.raises(SurgicalError, match=r"learning_rate=1e\+30.*NaN"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scoring_a_recipe() -> None:
    scores = score(replace(RECIPE, num_batches=2))
    assert list(scores.values) == ["embeddings", *map(str, range(6)), "final_norm", "head"]
    assert scores.num_batches == 2
    assert scores == score(replace(RECIPE, num_batches=2))


def test_a_folder_of_something_else_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.txt").write_text("mine")
    with pytest.raises(SurgicalError, match="would be lost"):
        train(RECIPE, tmp_path)
    assert (tmp_path / "adapter" / "thesis.txt").read_text() == "mine"


def test_an_earlier_run_loses_nothing_when_saving_fails(
    tmp_path: Path, small_splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old report was deleted before the new adapter was written."""
    recipe = replace(RECIPE, training={**RECIPE.training, "max_steps": 1})
    train(recipe, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        train(recipe, tmp_path)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert [path.name for path in after.keys() - before.keys()] == ["unfinished.json"]  # for the next start


def test_a_new_head_is_trained_and_saved_with_any_block(tmp_path: Path, small_splits: None) -> None:
    for blocks in (["0"], ["0", "head"]):
        report = train(replace(RECIPE, new_head=True, blocks=blocks, label_map=None), tmp_path)
        assert report.after["test"] > 0.5, blocks
        task = load_task(replace(RECIPE, label_map=None))  # its own head: the adapter brings the new one
        model = PeftModel.from_pretrained(task.load_model(), tmp_path / "adapter")
        assert task.measure(model, [task.splits["test"][i] for i in range(200)]) == report.after["test"], blocks
