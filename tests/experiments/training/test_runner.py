"""A recipe's trainings in one process: each is what it would be by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.training.runner import RecipeRunner, Remembered
from tests.support.tiny import write_recipe


def add_lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))  # type: ignore[arg-type]


def test_new_weights_do_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    runner = RecipeRunner(load_recipe(write_recipe(tmp_path, seed=3)))
    first, _ = runner.train(add_lora, max_steps=2)
    torch.rand(7)
    second, _ = runner.train(add_lora, max_steps=2)
    other, _ = runner.train(add_lora, max_steps=2, seed=4)
    weights, again, others = (model.state_dict() for model in (first, second, other))
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert any(not torch.equal(weight, others[name]) for name, weight in weights.items() if "lora_A" in name)


ITEMS = [{"pixel_values": torch.full((1, 2, 2), float(number)), "labels": torch.tensor(number)} for number in range(5)]
TEXTS = [{"input_ids": [1] * (number + 1), "labels": number} for number in range(5)]


@pytest.mark.parametrize("items", [ITEMS, TEXTS], ids=["of one shape", "of many lengths"])
@pytest.mark.parametrize("room", [0, 10, 2**20])
def test_examples_are_kept_as_they_are(items: list[Any], room: int, tmp_path: Path) -> None:
    """Those for which there is no room are made anew."""
    first = Remembered(items, "train", room=room)
    first.make_all(tmp_path)
    kept = len(first._made)
    assert (kept == {0: 0, 2**20: 5}.get(room, kept) and kept < 5) or room == 2**20
    never = [pytest.fail if index < kept else item for index, item in enumerate(items)]
    again = Remembered(never, "train", tmp_path)  # type: ignore[arg-type]
    assert len(again) == 5
    assert [{key: torch.as_tensor(value).tolist() for key, value in again[index].items()} for index in range(5)] == [
        {key: torch.as_tensor(value).tolist() for key, value in item.items()} for item in items
    ]


def test_a_training_with_kept_examples_is_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    runner = RecipeRunner(recipe)
    plain, _ = runner.train(add_lora)
    for examples in runner.examples.values():
        examples.make_all(tmp_path / "made")
    kept, _ = RecipeRunner(recipe, made=tmp_path / "made").train(add_lora)
    assert all(torch.equal(weight, kept.state_dict()[name]) for name, weight in plain.state_dict().items())
