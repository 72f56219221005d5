"""Source data: their loss, what of them is measured, and what does not fit."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from surgical_peft import SurgicalError
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.tasks.evaluation import mean_loss
from surgical_peft.experiments.training.report import TrainingReport
from surgical_peft.experiments.training.source_data import SourceData, source_recipe
from surgical_peft.experiments.training.summary import table
from surgical_peft.experiments.training.train import train
from surgical_peft.scoring.batches import IGNORED
from tests.support.tiny import write_data, write_recipe
from tests.support.toy_tasks import TOY_TASKS

QUIET = Console(file=io.StringIO())


@pytest.mark.parametrize("name", TOY_TASKS)
def test_the_loss_is_the_mean_over_all_that_is_predicted(name: str, tmp_path: Path) -> None:
    """Whatever the batches: their means do not count alike, as they do not have as many tokens."""
    task = load_task(TOY_TASKS[name](tmp_path), ("test",))
    model, examples = task.load_model().train(), task.splits["test"]
    total, count = 0.0, 0
    with torch.no_grad():
        for example in (examples[place] for place in range(len(examples))):
            batch = task.collate([example])
            labels = batch.get("labels", torch.zeros(1))  # of an answer two places, which are one example
            size = int(((labels[:, 1:] if name == "causal_lm" else labels) != IGNORED).sum())
            total, count = total + size * float(model.eval()(**batch).loss), count + size
    model.train()
    padded = () if name == "question_answering" else (4,)  # its loss looks at padding, too: that of transformers does
    for size in (1, *padded):
        assert mean_loss(model, examples, task.collate, size) == pytest.approx(total / count, rel=1e-5)
    assert model.training


def test_it_is_the_log_likelihood_of_a_language_model(tmp_path: Path) -> None:
    task = load_task(replace(TOY_TASKS["causal_lm"](tmp_path), metric="log_likelihood"), ("test",))
    model = task.load_model()
    loss = mean_loss(model, task.splits["test"], task.collate, 4)
    assert loss == pytest.approx(-task.measure(model, task.splits["test"]), rel=1e-5)


def test_class_weights_are_for_training_alone(tmp_path: Path) -> None:
    write_data(tmp_path / "other")
    plain = load_recipe(write_recipe(tmp_path, source_data="other"))
    weighted = load_task(replace(plain, class_weights=[5.0, 1.0, 1.0]), ("train",)).load_model()
    source = SourceData(plain)
    assert source.loss(weighted) == source.loss(load_task(plain, ("train",)).load_model())
    batch = source.task.collate([source.examples[0]])
    assert weighted(**batch).loss.item() == pytest.approx(5 * source.loss(weighted, [source.examples[0]]))


def test_a_sample_is_drawn_once_and_from_all_classes(tmp_path: Path) -> None:
    """Every third image would be one class alone."""
    recipe = load_recipe(write_recipe(tmp_path, source_data="data", corruption="contrast"))
    source = SourceData(recipe, most=16)
    labels = [int(source.sample[place]["labels"]) for place in range(len(source.sample))]
    assert len(labels) == 16 and len(set(labels)) == 3 and len(source.examples) == 48 and source.split == "test"
    again = SourceData(recipe, most=16)
    assert labels == [int(again.sample[place]["labels"]) for place in range(16)]
    clean = load_task(replace(recipe, corruption=None), ("test",)).splits["test"]
    assert torch.equal(source.examples[0]["pixel_values"], clean[0]["pixel_values"])  # unshifted


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"source_data": "data", "new_head": True}, "new_head"),
        ({"source_data": {"dat": "data"}}, "data_config"),
        ({"source_data": {"data": "data", "lable_map": []}}, "'label_map'"),
        ({"source_data": "./nowhere"}, "source_data.*nowhere"),
    ],
)
def test_source_data_that_do_not_fit_are_told_before_training(keys: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=said):
        train(load_recipe(write_recipe(tmp_path, blocks=[0], **keys)), console=QUIET)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingReport]:
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "source", ("train", "validation"), count=12)
    recipe = load_recipe(write_recipe(folder, blocks=[0], source_data="source", label_map=[1, 0, 2], max_steps=3))
    return folder, train(recipe, console=QUIET)


def test_train_tells_the_loss_and_the_metric_before_and_after(trained: tuple[Path, TrainingReport]) -> None:
    folder, report = trained
    found, recipe = report.source, load_recipe(folder / "recipe.yaml")
    assert found is not None and (found.split, found.examples, found.metric) == ("source validation", 12, "accuracy")
    source = SourceData(recipe)
    model = source.task.load_model()
    assert found.loss_before == pytest.approx(source.loss(model)) and found.before == source.metric(model)
    assert found.loss_after != found.loss_before and found.rise == found.loss_after - found.loss_before
    assert TrainingReport.load(folder / "run" / "report.json") == report


def test_table_and_card_tell_it(trained: tuple[Path, TrainingReport]) -> None:
    folder, report = trained
    assert report.source is not None
    shown, card = str(table(report)), (folder / "run" / "adapter" / "README.md").read_text()
    assert "source validation, loss" in shown and f"{report.source.rise:+.3f} nats" in shown
    assert f"| source validation, loss | 12 | {report.source.loss_before:.4f} |" in card
    assert f"{report.source.rise:+.3f} nats" in card


def test_a_report_without_is_as_before(trained: tuple[Path, TrainingReport]) -> None:
    _, report = trained
    plain = replace(report, source=None)
    assert "source" not in plain.to_json() and "Source" not in str(table(plain))
    assert TrainingReport.from_json(json.loads(json.dumps(plain.to_json()))) == plain


def test_source_keys_go_over_the_recipes_own(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, corruption="contrast", severity=3, imbalance={0: 0.5}, drop_empty=True)
    path.write_text(path.read_text() + yaml.safe_dump({"source_data": {"data": "data", "severity": 2}}))
    own = source_recipe(load_recipe(path))
    assert (own.corruption, own.severity, own.imbalance, own.drop_empty) == (None, 2, {}, False)
