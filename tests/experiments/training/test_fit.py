"""Training with the prefix cache of a recipe: the same adapter, as large as the dry run said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgical_peft import SurgicalError
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.training import fit as module
from surgical_peft.experiments.training.train import train
from surgical_peft.experiments.training.train_plan import plan
from tests.support.tiny import write_recipe


def test_the_same_adapter_with_what_the_dry_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path, blocks=["1"], prefix_cache=True, eval_strategy="epoch"))
    planned = plan(recipe)
    assert not (tmp_path / "run").exists()
    assert (planned.cached_examples, planned.files) == (96, 0)
    caches, make = list[Any](), module.cache_prefix

    def watched(*given: Any, **options: Any) -> Any:
        caches.append(make(*given, **options))
        return caches[-1]

    monkeypatch.setattr(module, "cache_prefix", watched)
    train(recipe, tmp_path / "cached")
    (cache,) = caches
    assert cache.store.held == planned.memory == 96 * 5 * 16 * 4
    assert cache.misses == 2 * 6 and cache.hits == 2 * 6
    assert not (tmp_path / "cached" / "prefix_cache").exists()
    plain = load_recipe(write_recipe(tmp_path, blocks=["1"], eval_strategy="epoch"))
    assert plain.settings() == recipe.settings()
    train(plain, tmp_path / "plain")
    one, other = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("plain", "cached"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"blocks": ["embeddings"]}, "before"),
        ({"unlabelled": True, "blocks": ["1"]}, "unlabelled"),
        ({"torch_compile": True, "blocks": ["1"]}, "torch_compile"),
    ],
)
def test_what_does_not_go_with_it_is_said_before_training(keys: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=word):
        train(load_recipe(write_recipe(tmp_path, prefix_cache=True, **keys)))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_dry_run_of_blocks_that_are_not_chosen(tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="auto"):
        plan(load_recipe(write_recipe(tmp_path, blocks="auto", prefix_cache=True)))
