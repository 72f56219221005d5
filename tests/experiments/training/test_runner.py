"""A recipe's trainings in one process: each is what it would be by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.training.runner import RecipeRunner
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
