from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset

from surgical_peft import SurgicalError
from surgical_peft.recipe import Recipe
from surgical_peft.tasks import load_task, model_of_config

SHIPPED = Path(__file__).parents[1] / "recipes" / "fashion_mnist"
RECIPE = Recipe(model=str(SHIPPED / "vit"), data=str(SHIPPED / "target-0"), blocks=[0])


def test_examples_are_what_the_model_takes() -> None:
    task = load_task(RECIPE)
    example = task.splits["train"][0]
    assert example["pixel_values"].shape == (1, 28, 28)
    assert task.load_model()(example["pixel_values"][None]).logits.shape == (1, 10)


def test_the_source_model_knows_the_clean_images() -> None:
    task = load_task(RECIPE)
    examples = [task.splits["test"][index] for index in range(200)]
    with torch.inference_mode():
        logits = task.load_model()(torch.stack([each["pixel_values"] for each in examples])).logits
    assert (logits.argmax(-1) == torch.stack([each["labels"] for each in examples])).float().mean() > 0.82


def test_noise_depends_on_place_and_split_alone() -> None:
    noisy = replace(RECIPE, corruption="gaussian_noise")
    first, second = load_task(noisy).splits, load_task(noisy).splits
    assert torch.equal(first["train"][3]["pixel_values"], second["train"][3]["pixel_values"])
    clean = load_task(RECIPE).splits
    noise = [(first[split][3]["pixel_values"] - clean[split][3]["pixel_values"]) for split in ("train", "test")]
    assert noise[0].std() > 0.3 and not torch.equal(*noise)


def test_labels_are_mapped() -> None:
    flipped = load_task(replace(RECIPE, label_map=list(range(9, -1, -1)))).splits["validation"]
    plain = load_task(RECIPE).splits["validation"]
    assert all(flipped[i]["labels"] == 9 - plain[i]["labels"] for i in range(20))


def test_the_three_draws_share_no_image() -> None:
    """Target draws must be disjoint from each other, split by split: 12,000 different images."""
    seen = set()
    for draw in range(3):
        data = load_dataset(str(SHIPPED / f"target-{draw}"))
        for split in data.values():
            seen |= {np.asarray(image).tobytes() for image in split["image"]}
    assert len(seen) == 12_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "image_clasification"}, "did you mean 'image_classification'"),
        ({"model": "no-such/model"}, "the model 'no-such/model' cannot be loaded"),
        ({"data": "no-such/data"}, "the data set 'no-such/data' cannot be loaded"),
        ({"label_map": [1, 0]}, "it needs 10 entries"),
        ({"label_map": [10] * 10}, "does not fit"),
        ({"corruption": "snow"}, "corruption 'snow' is unknown"),
        ({"corruption": "gaussian_noise", "severity": 9}, "severity=9 is out of range"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(RECIPE, **change))  # type: ignore[arg-type]


def test_data_without_a_test_split(tmp_path: Path) -> None:
    load_dataset(RECIPE.data)["train"].to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SurgicalError, match="has the splits train; it needs train, validation, test"):
        load_task(replace(RECIPE, data=str(tmp_path)))


def test_a_models_blocks_need_its_config_only() -> None:
    model = model_of_config(RECIPE.model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == 205_962
