"""Batch normalization in a recipe's trainings: `norm_eval` keeps its statistics, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.experiments.compare.methods import make_method
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.training.runner import RecipeRunner
from surgical_peft.scoring.selection import Selection
from tests.support.tiny import write_recipe


def resnet_recipe(folder: Path, **keys: bool) -> Recipe:
    """The recipe of `write_recipe` with a small ResNet in the place of its ViT."""
    path = write_recipe(folder, **keys)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, num_channels=3
    )
    torch.manual_seed(0)
    ResNetForImageClassification(config).save_pretrained(folder / "model")
    return load_recipe(path)


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """By the names of the model without a wrapper, whose prefix they may have."""
    return {name[name.index("resnet.") :]: value for name, value in model.named_buffers() if "running" in name}


def tune_first(model: nn.Module) -> nn.Module:
    return get_surgical_model(model, SurgicalConfig(blocks=["embeddings"]))


@pytest.mark.parametrize("wrap", [tune_first, lambda model: model], ids=["a block", "everything"])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_statistics_stay_and_weights_train(wrap, norm_eval: bool, tmp_path: Path) -> None:
    runner = RecipeRunner(resnet_recipe(tmp_path, norm_eval=norm_eval))
    trained, _ = runner.train(wrap, max_steps=2)
    after = statistics_of(trained)
    moved = [name for name, value in statistics_of(runner.model).items() if not torch.equal(value, after[name])]
    assert bool(moved) != norm_eval
    weights = dict(trained.named_parameters())
    name = next(name for name in weights if name.endswith("embedder.embedder.normalization.weight"))
    source = runner.model.get_parameter("resnet.embedder.embedder.normalization.weight")
    assert not torch.equal(weights[name], source)


def test_a_model_without_batch_normalization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="norm_eval"):
        RecipeRunner(load_recipe(write_recipe(tmp_path, norm_eval=True)))


def test_lora_adapts_the_modules_that_it_is_given(tmp_path: Path) -> None:
    recipe = resnet_recipe(tmp_path)
    method = make_method({"lora": {"rank": 2, "target_modules": ["convolution"]}})
    model = method.wrap(RecipeRunner(recipe).task.load_model(), Selection(()), recipe)
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted and all(name.endswith("convolution") for name in adapted)
