"""Early stopping and the best epoch, as keys of a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.training.runner import RecipeRunner
from surgical_peft.experiments.training.train import train
from tests.support.toy_tasks import TOY_TASKS


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    toy = TOY_TASKS["text_classification"](tmp_path_factory.mktemp("texts"))
    training = {"use_cpu": True, "num_train_epochs": 12, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    return replace(toy, character_noise=None, blocks=["1", "head"], training=training, early_stopping_patience=2)


def test_training_stops_early_and_keeps_the_best_epoch(recipe: Recipe, tmp_path: Path) -> None:
    report = train(recipe, tmp_path)
    (best,) = tmp_path.glob("checkpoint-*")
    state = json.loads((best / "trainer_state.json").read_text())
    assert report.rates.epochs == state["epoch"] + 2 < 12
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (best, tmp_path / "adapter")]
    assert weights[0].keys() == weights[1].keys()
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def test_trainings_of_a_search_go_to_their_end(recipe: Recipe) -> None:
    runner = RecipeRunner(replace(recipe, training={**recipe.training, "num_train_epochs": 1}))
    tuned, _ = runner.train(lambda model: get_surgical_model(model, SurgicalConfig(blocks=["head"])))
    assert any(weight.requires_grad for weight in tuned.parameters())


def test_patience_is_a_number_of_epochs(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d\nblocks: [0]\nearly_stopping_patience: 0\n")
    with pytest.raises(SurgicalError, match="early_stopping_patience=0"):
        load_recipe(tmp_path / "recipe.yaml")
