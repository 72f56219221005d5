"""Images without labels: their copies, the loss on these, and what is never looked at."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from torch import nn
from transformers import AutoModelForImageClassification

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model, policies, score_blocks
from surgical_peft.experiments.advise.advise import _signature
from surgical_peft.experiments.recipe import Recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.tasks.augmentations import OPERATIONS, augmix
from surgical_peft.experiments.tasks.marginal_entropy import UNLABELED, MarginalEntropy, marginal_entropy
from surgical_peft.experiments.training.runner import RecipeRunner
from surgical_peft.experiments.training.summary import last_lines
from surgical_peft.experiments.training.tiny import make_tiny
from surgical_peft.experiments.training.train import train
from tests.support.tiny import CLASSES, write_data, write_model

COPIES = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("unlabelled")
    training = {"use_cpu": True, "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 1e-2}
    data = write_data(folder / "data", count=20)
    return Recipe(
        model=write_model(folder / "model"), data=data, unlabelled=True, copies=COPIES, blocks=[0], training=training
    )


@pytest.fixture(scope="module")
def runner(recipe: Recipe) -> RecipeRunner:
    return RecipeRunner(recipe, ("train", "validation", "test"))


def batch_of(runner: RecipeRunner, split: str, count: int) -> dict[str, torch.Tensor]:
    return runner.task.collate([runner.examples[split][index] for index in range(count)])


def picture(mode: str, width: int, height: int) -> PILImage.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return PILImage.fromarray(np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8))


def tune_first(model: nn.Module) -> nn.Module:
    return get_surgical_model(model, SurgicalConfig(blocks=[0]))


def test_the_entropy_is_that_of_the_mean_prediction() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(5, 7, 11, dtype=torch.float64)
    mean = (logits.exp() / logits.exp().sum(-1, keepdim=True)).mean(1)
    plain = -(mean * mean.log()).sum(-1)
    assert marginal_entropy(logits).dtype == torch.float64
    torch.testing.assert_close(marginal_entropy(logits), plain)
    torch.testing.assert_close(marginal_entropy(logits.bfloat16()), plain.float(), rtol=0.05, atol=0.02)


def test_the_entropy_of_sure_predictions_is_a_number() -> None:
    """Copies that agree have none, those that contradict each other the most; no logarithm of 0 spoils a gradient."""
    logits = torch.tensor([[[1e4, 0.0], [1e4, 0.0]], [[1e4, 0.0], [0.0, 1e4]]], requires_grad=True)
    entropies = marginal_entropy(logits)
    torch.testing.assert_close(entropies, torch.tensor([0.0, np.log(2)], dtype=torch.float32))
    entropies.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_the_model_has_that_loss_on_copies_and_its_own_on_images(recipe: Recipe, runner: RecipeRunner) -> None:
    model = runner.model
    plain = AutoModelForImageClassification.from_pretrained(recipe.model).eval()
    batch = batch_of(runner, "train", 4)
    assert batch["pixel_values"].shape == (4, COPIES, 3, 8, 8)
    logits = plain(pixel_values=batch["pixel_values"].flatten(0, 1)).logits
    entropies = marginal_entropy(logits.view(4, COPIES, CLASSES))
    torch.testing.assert_close(model(**batch).loss, entropies.mean())
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(8)).loss, entropies.sum() / 8)
    labeled = batch_of(runner, "validation", 4)
    torch.testing.assert_close(model(**labeled).loss, plain(**labeled).loss)
    assert model(pixel_values=labeled["pixel_values"]).loss is None
    torch.testing.assert_close(copy.deepcopy(model)(**batch).loss, entropies.mean())


def test_training_copies_bear_no_label_and_stay_the_same(recipe: Recipe, runner: RecipeRunner) -> None:
    first, second = runner.task.splits, load_task(recipe, ("train",)).splits
    assert all(first["train"][index]["labels"] == UNLABELED for index in range(20))
    assert torch.equal(first["train"][3]["pixel_values"], second["train"][3]["pixel_values"])
    copies = first["train"][3]["pixel_values"]
    assert not torch.equal(copies[0], copies[1])
    assert not torch.equal(copies, first["train"][4]["pixel_values"])
    more = load_task(replace(recipe, copies=COPIES + 1), ("train",)).splits["train"][3]["pixel_values"]
    assert torch.equal(more[:COPIES], copies)
    other = load_task(replace(recipe, shift_seed=1), ("train",)).splits["train"][3]["pixel_values"]
    assert not torch.equal(other, copies)
    for split in ("validation", "test"):
        assert first[split][3]["pixel_values"].shape == (3, 8, 8) and first[split][3]["labels"] == 0


def test_what_is_copied_is_the_corrupted_image(recipe: Recipe, runner: RecipeRunner) -> None:
    noisy = load_task(replace(recipe, corruption="gaussian_noise"), ("train",)).splits["train"]
    copies, noisy_copies = (
        torch.stack([examples[index]["pixel_values"] for index in range(6)])
        for examples in (runner.examples["train"], noisy)
    )
    assert noisy_copies.std((-1, -2)).mean() > 1.5 * copies.std((-1, -2)).mean()


@pytest.mark.parametrize(("mode", "width", "height"), [("L", 28, 28), ("RGB", 8, 8), ("RGB", 64, 40), ("L", 5, 3)])
def test_an_augmented_image_is_another_of_its_kind(mode: str, width: int, height: int) -> None:
    image = picture(mode, width, height)
    draws = [augmix(image, np.random.default_rng(draw)) for draw in range(4)]
    assert all(each.mode == mode and each.size == (width, height) for each in draws)
    assert len({each.tobytes() for each in draws}) == 4
    assert augmix(image, np.random.default_rng(0)).tobytes() == draws[0].tobytes()
    assert image.tobytes() == picture(mode, width, height).tobytes()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_operation_changes_pixels_little_and_no_sizes(operation: Any, mode: str) -> None:
    """Beyond the edges it is gray: no channel of a color image may be left black."""
    gray = PILImage.new(mode, (64, 64), 128 if mode == "L" else (128, 128, 128))
    for draw in range(8):
        made = operation(picture(mode, 64, 64), np.random.default_rng(draw))
        assert made.mode == mode and made.size == (64, 64)
        if operation not in OPERATIONS[:2]:  # these stretch what there is, gray to black
            assert np.asarray(operation(gray, np.random.default_rng(draw))).min() >= 100


def test_shifts_and_padding_grow_with_the_image() -> None:
    """A twelfth of the draws of a small image moves it by a pixel; a large one moves further."""
    ramp = PILImage.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))
    shifted = [OPERATIONS[6](ramp, np.random.default_rng(draw)) for draw in range(20)]
    moves = [abs(int(np.asarray(each)[128, 128]) - 128) for each in shifted]
    assert 5 <= max(moves) <= 256 // 30 and len(set(moves)) > 2


def shuffled(folder: Path, to: Path) -> str:
    """The same data with other labels of the training split."""
    to.mkdir()
    for split in ("train", "validation", "test"):
        rows = load_dataset(str(folder), split=split)
        if split == "train":
            labels = np.random.default_rng(0).permutation(rows["label"])
            assert labels.tolist() != rows["label"]
            rows = Dataset.from_dict({"image": rows["image"], "label": labels}, features=rows.features)
        rows.to_parquet(to / f"{split}.parquet")
    return str(to)


def test_labels_of_the_training_split_change_nothing(recipe: Recipe, runner: RecipeRunner, tmp_path: Path) -> None:
    """Bit for bit, also in the scores; and what is frozen does not move."""
    other = replace(recipe, data=shuffled(Path(recipe.data), tmp_path / "other"))
    runners = runner, RecipeRunner(other)
    one, two = (each.train(tune_first)[0].state_dict() for each in runners)
    assert one.keys() == two.keys() and all(torch.equal(weight, two[name]) for name, weight in one.items())
    before = runner.model.state_dict()
    moved = {name for name, weight in before.items() if not torch.equal(weight, one[f"base_model.model.{name}"])}
    assert moved and all(".layers.0." in name for name in moved)
    first, second = (score_blocks(each.model, [batch_of(each, "train", 8)], "rgn").values for each in runners)
    assert first == second


def test_gradients_that_are_accumulated_are_those_of_the_whole(runner: RecipeRunner) -> None:
    """Also where the last batch is smaller: 20 images in batches of 8."""
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    whole, _ = runner.train(tune_first, per_device_train_batch_size=20, **sgd)
    parts, _ = runner.train(tune_first, per_device_train_batch_size=8, gradient_accumulation_steps=3, **sgd)
    source = runner.model.state_dict()
    names = [name for name in source if ".layers.0." in name]
    for name in names:
        moves = [model.state_dict()[f"base_model.model.{name}"] - source[name] for model in (whole, parts)]
        torch.testing.assert_close(*moves, rtol=1e-3, atol=1e-6)


def test_the_training_split_needs_no_labels(recipe: Recipe, runner: RecipeRunner, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = load_dataset(recipe.data, split=split)
        (rows.select_columns("image") if split == "train" else rows).to_parquet(tmp_path / f"{split}.parquet")
    task, whole = load_task(replace(recipe, data=str(tmp_path))), runner.task
    assert torch.equal(task.splits["train"][5]["pixel_values"], whole.splits["train"][5]["pixel_values"])
    assert task.splits["test"][5]["labels"] == whole.splits["test"][5]["labels"]


@pytest.mark.parametrize("is_sorted", [True, False], ids=["in folders of classes", "in one folder"])
def test_a_folder_of_images(recipe: Recipe, tmp_path: Path, is_sorted: bool) -> None:
    """The one folder of the training images, which is called as the split, is no class."""
    for split in ("train", "validation", "test"):
        for place, row in enumerate(load_dataset(recipe.data, split=split).select(range(6))):
            kind = ("apple", "pear", "zebra")[row["label"]]
            folder = tmp_path / split / (kind if is_sorted or split != "train" else "")
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{place}.png")
    task = load_task(replace(recipe, data=str(tmp_path)))
    assert len(task.splits["train"]) == 6 and task.splits["train"][0]["labels"] == UNLABELED
    labels = [int(task.splits["validation"][index]["labels"]) for index in range(6)]
    assert labels == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"unlabelled": "offline"}, "'offline'.*online"),
        ({"copies": 1}, "copies=1 "),
        ({"task": "text_classification"}, "unlabelled=True.*text_classification"),
        ({"problem_type": "regression"}, "problem_type.*unlabelled"),
        ({"class_weights": "balanced"}, "class_weights.*unlabelled"),
        ({"new_head": True}, "new_head.*unlabelled"),
        ({"imbalance": {0: 0.5}}, "imbalance.*unlabelled"),
        ({"folds": 3}, "folds.*unlabelled"),
        ({"label_map": [0, 1, None]}, "label_map.*unlabelled"),
        ({"training": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
        ({"policy": "two_stage", "policy_options": {"counts": [1, 2, 3], "epochs": 1}}, "loss on labels"),
        ({"splits": {"validation": None}}, "validation"),
        ({"unlabelled": "online", "training": {"num_train_epochs": 3}}, "num_train_epochs.*online"),
        ({"unlabelled": "online", "test_metrics": {"macro_f1": None}}, "test_metrics.*stream"),
        ({"unlabelled": "online", "early_stopping_patience": 1}, "early_stopping_patience.*online"),
        ({"unlabelled": "online", "policy": "gradual_unfreezing", "training": {}}, "epochs.*stream"),
    ],
)
def test_what_does_not_go_with_it(recipe: Recipe, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(recipe, **keys))


def test_a_permutation_of_labels_is_only_for_measuring(recipe: Recipe) -> None:
    mapped = load_task(replace(recipe, label_map=[1, 2, 0])).splits
    assert mapped["train"][1]["labels"] == UNLABELED and mapped["test"][1]["labels"] == 2


def test_labels_are_those_of_the_validation_split(recipe: Recipe, tmp_path: Path) -> None:
    """A class that it lacks cannot be matched: the error says which split to look at."""
    for split, names in (("train", "ab"), ("validation", "ab"), ("test", "abc")):
        images = [np.zeros((8, 8, 3), np.uint8)] * len(names)
        features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
        data = Dataset.from_dict({"image": images, "label": list(range(len(names)))}, features=features)
        data.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SurgicalError, match=r"split test.*'c'.*validation"):
        load_task(replace(recipe, data=str(tmp_path)))


@pytest.mark.parametrize("name", ["auto_rgn", "auto_snr", "bvg_ls", "gradual_unfreezing", "lisa"])
def test_policies_follow_the_entropy(runner: RecipeRunner, name: str) -> None:
    """Those that probe, that watch gradients, and that freeze by turns."""
    policy, config = getattr(policies, name)(), SurgicalConfig(blocks="all")
    trained, _ = runner.train(lambda model: get_surgical_model(model, config), policy=policy)
    assert all(weight.isfinite().all() for weight in trained.parameters())


@pytest.mark.parametrize("criterion", ["probe", "fisher", "snr"])
def test_criteria_score_by_the_entropy(runner: RecipeRunner, criterion: str) -> None:
    """Short trainings, single examples and batches alike see the loss of the copies."""
    scores = score_blocks(runner.model, [batch_of(runner, "train", count) for count in (4, 8)], criterion)
    assert {"0", "1"} <= scores.values.keys() and len(set(scores.values.values())) > 1


def test_train_says_what_labels_were_used_for(recipe: Recipe, tmp_path: Path) -> None:
    report = train(recipe, tmp_path)
    assert report.after.keys() == {"validation", "test"}
    assert any("No label" in line for line in last_lines(report))
    assert "labels of train are not used" in (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")


def test_the_signature_of_a_shift_compares_images_as_they_are(recipe: Recipe, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    noisy = replace(recipe, data=data, corruption="gaussian_noise")
    source = load_task(replace(recipe, data=data, unlabelled=False), ("test",)).splits["test"]
    signature = _signature(RecipeRunner(noisy), [source[index % 48] for index in range(96)])
    assert signature.moved is not None and signature.moved.keys() >= {"embeddings", "0", "1"}


@pytest.mark.parametrize("unlabelled", [True, "online"])
def test_tiny_has_such_data(recipe: Recipe, unlabelled: Any, tmp_path: Path) -> None:
    sizes = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = make_tiny(replace(recipe, unlabelled=unlabelled, tiny=sizes | {"image_size": 8, "patch_size": 4}), tmp_path)
    task = load_task(replace(made, training={**made.training, "num_train_epochs": 1} if unlabelled is True else {}))
    assert task.splits["train"][0]["pixel_values"].shape == (COPIES, 3, 8, 8)


def test_hooks_are_for_copies_alone() -> None:
    """A model that does without them is not in their way, in a batch that fails after one that did not."""
    hooks = MarginalEntropy()
    model = nn.Module()
    model.forward = lambda **kwargs: kwargs  # type: ignore[method-assign]
    hooks.put_on(model)
    assert model(pixel_values=torch.zeros(2, 3, 4, 4), labels=1).keys() == {"pixel_values", "labels"}
