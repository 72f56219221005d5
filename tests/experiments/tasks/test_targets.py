"""Several labels at once, numbers, and weighted classes: what is learned, by which loss, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertForSequenceClassification, Trainer

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import Task, load_task
from surgical_peft.experiments.training.fit import fit
from surgical_peft.experiments.training.train import train
from tests.support.toy_tasks import TOY_TASKS, bert, write_model

TOPICS = [["sport"], [], ["news", "sport"], ["news"]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = TOY_TASKS["text_classification"](tmp_path_factory.mktemp("texts"))
    training = {"use_cpu": True, "max_steps": 2, "learning_rate": 1e-3}
    return replace(recipe, character_noise=None, blocks=["head"], training=training)


def folder_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    for split in ("train", "validation"):
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def numbers(folder: Path) -> str:
    return folder_of(folder, [{"text": "now " * (1 + row % 3), "label": 0.5 * row} for row in range(12)])


def label_sets(folder: Path) -> str:
    return folder_of(folder, [{"text": "now", "label": TOPICS[row % 4]} for row in range(12)])


@pytest.mark.parametrize(
    ("problem", "make", "metric", "loss"),
    [
        ("regression", numbers, "r2", torch.nn.functional.mse_loss),
        ("multi_label_classification", label_sets, "micro_f1", torch.nn.functional.binary_cross_entropy_with_logits),
    ],
)
def test_the_loss_is_that_of_the_problem(
    texts: Recipe, tmp_path: Path, problem: str, make: Callable[[Path], str], metric: str, loss: Any
) -> None:
    recipe = replace(texts, data=make(tmp_path / "data"), problem_type=problem, new_head=True)
    task = load_task(recipe, ("train", "validation"))
    batch = task.collate([task.splits["train"][index] for index in range(4)])
    output = task.load_model()(**batch)
    assert torch.allclose(output.loss, loss(output.logits.squeeze(-1), batch["labels"]))
    assert task.metric == metric
    report = train(replace(recipe, task="text_classification"), tmp_path / "run")
    assert report.after.keys() == {"validation"} and report.metric == metric
    assert bool(report.dataset.labels) == (problem != "regression")


def test_label_sets_are_matched_by_name(texts: Recipe, tmp_path: Path) -> None:
    model = bert(BertForSequenceClassification, 3, id2label={0: "sport", 1: "weather", 2: "news"})
    recipe = replace(
        texts,
        model=str(write_model(tmp_path / "model", model)),
        data=label_sets(tmp_path / "data"),
        problem_type="multi_label_classification",
    )
    examples = load_task(recipe, ("train",)).splits["train"]
    assert [examples[index]["labels"] for index in range(4)] == [[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1]]


def test_a_label_that_training_lacks_is_told_with_its_row(texts: Recipe, tmp_path: Path) -> None:
    recipe = replace(texts, data=label_sets(tmp_path / "data"), problem_type="multi_label_classification")
    rows = [{"text": "now", "label": labels} for labels in (*TOPICS, ["sport", "war"])]
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "validation.parquet")
    with pytest.raises(SurgicalError, match=r"validation: 1 row .*'war'.*from 0: 4"):
        load_task(replace(recipe, new_head=True), ("validation",))


def test_a_list_with_an_entry_without_label(texts: Recipe, tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["news", "sport"]))})
    rows = [{"text": "now", "label": labels} for labels in ([0], [1], [0, -1])]
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    recipe = replace(texts, data=str(tmp_path), problem_type="multi_label_classification", new_head=True)
    with pytest.raises(SurgicalError, match=r"from 0: 2\)"):
        load_task(recipe, ("train",))


def test_images_have_numbers_too(tmp_path: Path) -> None:
    images = replace(TOY_TASKS["image_classification"](tmp_path / "toy"), corruption=None)
    recipe = replace(images, problem_type="regression", new_head=True)
    data = [load_task(images, ("train",)).splits["train"].data[row]["image"] for row in range(12)]  # type: ignore[attr-defined]
    rows = [{"image": image, "label": 1.5 * row} for row, image in enumerate(data)]
    task = load_task(replace(recipe, data=folder_of(tmp_path / "data", rows)), ("train", "validation"))
    batch = task.collate([task.splits["train"][index] for index in range(4)])
    assert batch["labels"].tolist() == [0, 1.5, 3, 4.5]
    assert task.load_model()(**batch).loss.isfinite()
    assert task.measure(task.load_model(), task.splits["validation"]) < 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"problem_type": "regresion"}, "regresion"),
        ({"problem_type": "regression"}, "2 labels.*new_head: true"),
        ({"problem_type": "regression", "new_head": True, "label_map": [1, 0]}, "label_map.*regression"),
        ({"problem_type": "regression", "new_head": True, "metric": "accuracy"}, "accuracy.*r2"),
        ({"problem_type": "multi_label_classification", "new_head": True}, "lists of classes"),
        ({"task": "causal_lm", "problem_type": "regression"}, "problem_type.*causal_lm"),
    ],
)
def test_what_does_not_fit(texts: Recipe, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(texts, data=numbers(tmp_path), **keys), ("train", "validation"))


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
def test_numbers_have_to_be_finite(texts: Recipe, tmp_path: Path, value: float | None) -> None:
    rows = [{"text": "now", "label": value if row == 3 else 0.5 * row} for row in range(12)]
    recipe = replace(texts, data=folder_of(tmp_path, rows), problem_type="regression", new_head=True)
    with pytest.raises(SurgicalError, match="label has 1 empty cell, row 3"):
        load_task(recipe, ("train",))


def weighted(texts: Recipe, folder: Path, weights: Any) -> Task:
    rows = [{"text": "now " * (1 + row % 3), "label": "spam" if row % 4 == 0 else "ham"} for row in range(12)]
    return load_task(replace(texts, data=folder_of(folder, rows), class_weights=weights), ("train", "validation"))


@pytest.mark.parametrize(("weights", "expected"), [("balanced", [12 / 18, 2.0]), ([1.0, 5], [1.0, 5.0])])
def test_weights_of_classes_are_in_the_loss(
    texts: Recipe, tmp_path: Path, weights: Any, expected: list[float]
) -> None:
    task = weighted(texts, tmp_path, weights)
    model = task.load_model()
    batch = task.collate([task.splits["train"][index] for index in range(6)])
    for network in (model, get_surgical_model(task.load_model(), SurgicalConfig(blocks=["head"]))):
        output = network(**batch)
        plain = torch.nn.functional.cross_entropy(output.logits, batch["labels"], reduction="none")
        assert torch.allclose(output.loss, (plain * torch.tensor(expected)[batch["labels"]]).mean())
    assert "loss" not in model(**{key: value for key, value in batch.items() if key != "labels"})
    assert any(line.startswith("class weights: ham") for line in task.summary)


def test_weights_are_the_same_with_accumulated_gradients(texts: Recipe, tmp_path: Path) -> None:
    task = weighted(texts, tmp_path / "data", "balanced")
    trained = []
    for size, steps in ((12, 1), (4, 3)):
        model = get_surgical_model(task.load_model(), SurgicalConfig(blocks=["head"]))
        args = replace(texts, training={}).arguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=1,
            learning_rate=1e-2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0,
        )
        trainer: Trainer = fit(model, args, task.splits["train"], collate=task.collate)
        trained.append({name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad})
    assert all(torch.allclose(weight, trained[1][name], atol=1e-6) for name, weight in trained[0].items())


@pytest.mark.parametrize("weights", ["balance", [1.0], [1.0, -1.0], {"ham": 1}])
def test_weights_that_cannot_be(texts: Recipe, tmp_path: Path, weights: Any) -> None:
    with pytest.raises(SurgicalError, match="class_weights"):
        weighted(texts, tmp_path, weights)
