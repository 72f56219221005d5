"""The signature of a shift: a distance that is what it claims, and what it says of shifts that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification

from surgical_peft import score_blocks
from surgical_peft.experiments.advise.shift_signature import Batches, Signature, energy_coefficient, signature
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task

IMAGES = Path(__file__).parents[3] / "recipes" / "fashion_mnist"
COUNT = 64


def sample(seed: int, count: int = 40, size: int = 3, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mean", [0.0, 0.5, 3.0])
def test_in_one_dimension_it_is_scipys_energy_distance(mean: float) -> None:
    one, other = sample(0, size=1), sample(1, count=25, size=1, mean=mean)
    between = 2 * (one - other.T).abs().mean()
    expected = stats.energy_distance(one[:, 0].numpy(), other[:, 0].numpy()) ** 2 / between
    assert energy_coefficient(one, other) == pytest.approx(float(expected), rel=1e-5)


def test_it_is_between_0_and_1_and_blind_to_scale_and_rotation() -> None:
    one, other = sample(0), sample(1, mean=1.0)
    found = energy_coefficient(one, other)
    turn = torch.linalg.qr(sample(2, count=3))[0]
    assert energy_coefficient(other, one) == pytest.approx(found)
    assert energy_coefficient(50 * one @ turn, 50 * other @ turn) == pytest.approx(found, rel=1e-4)
    assert energy_coefficient(one, one) == pytest.approx(0, abs=1e-9)
    assert energy_coefficient(torch.zeros(4, 2), torch.zeros(4, 2)) == 0  # a block that returns a constant
    assert 0 < found < energy_coefficient(one, sample(1, mean=5.0)) < 1
    assert energy_coefficient(torch.zeros(4, 2), torch.ones(4, 2)) == 1


# Shifts of real images, and the model that knows them without


def batches(recipe: Recipe, split: str, places: range) -> Batches:
    task = load_task(recipe, (split,))
    return [task.collate([task.splits[split][place] for place in places])]


@pytest.fixture(scope="module")
def plain() -> Recipe:
    return Recipe(model=str(IMAGES / "vit"), data=str(IMAGES / "target-0"), training={"use_cpu": True})


@pytest.fixture(scope="module")
def source(plain: Recipe) -> tuple[Batches, Batches]:
    return batches(plain, "test", range(COUNT)), batches(plain, "test", range(COUNT, 2 * COUNT))


@pytest.mark.parametrize(
    ("shift", "kind"),
    [
        ({"corruption": "gaussian_noise"}, "input"),
        ({"label_map": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}, "output"),
        ({}, "nothing"),
    ],
)
def test_it_tells_what_moved(shift: dict[str, Any], kind: str, plain: Recipe, source: tuple[Batches, Batches]) -> None:
    recipe = replace(plain, **shift)
    model = load_task(recipe, ("train",)).load_model()
    found = signature(model, batches(recipe, "train", range(COUNT)), source)
    assert found.kind == kind
    assert found.moved is not None and found.floor is not None
    assert list(found.moved) == ["embeddings", *map(str, range(6)), "final_norm", "head"] == list(found.floor)
    assert bool(found.moving) == (kind == "input")


@pytest.mark.parametrize(
    ("moved", "loss", "kind", "moving"),
    [
        ((0.2, 0.3), 2.0, "input", ("0", "1")),
        ((0.1, 0.21), 2.0, "features", ("1",)),
        ((0.1, 0.2), 2.0, "output", ()),  # twice what is chance is chance
        ((0.1, 0.1), 1.4, "nothing", ()),
    ],
)
def test_kinds(moved: tuple[float, float], loss: float, kind: str, moving: tuple[str, ...]) -> None:
    floor = {"0": 0.05, "1": 0.1}
    found = Signature({}, loss, 1.0, {"0": moved[0], "1": moved[1]}, floor)
    assert (found.kind, found.moving) == (kind, moving)


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=50))


def words(count: int, padding: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 50, (count, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    empty = torch.zeros(count, padding, dtype=torch.long)
    both = {"input_ids": torch.cat([tokens, empty], 1), "attention_mask": torch.cat([mask, empty], 1)}
    return {**both, "labels": torch.arange(count) % 2}


def test_padding_does_not_count() -> None:
    short, long = [words(8, padding=0)], [words(8, padding=9)]
    found = signature(bert(), long, (short, short))
    assert found.moved is not None and max(found.moved.values()) < 1e-4
    unmasked = [{**long[0], "attention_mask": torch.ones_like(long[0]["input_ids"])}]
    moved = signature(bert(), unmasked, (short, short)).moved
    assert moved is not None and moved["embeddings"] > 0.1


def test_without_source_there_are_gradients_alone() -> None:
    model, target = bert(), [words(8, 0)]
    found = signature(model, target)
    assert found.gradients == score_blocks(model, target, "rgn").values
    assert (found.kind, found.moved, found.moving) == (None, None, ())


def test_the_model_is_left_as_it_was() -> None:
    model = bert().train()
    model.classifier.requires_grad_(False)
    signature(model, [words(8, 0)], ([words(8, 0)], [words(8, 2)]))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
