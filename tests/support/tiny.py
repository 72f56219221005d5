"""A recipe small enough for tests to search: a ViT of two layers on 48 images of 8 x 8 pixels."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

CLASSES = 3
gc.freeze()  # Trainer looks through all that was imported for garbage, after each of the many short trainings


def write_model(folder: Path) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3, num_labels=CLASSES)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


def write_data(folder: Path, splits: tuple[str, ...] = ("train", "validation", "test"), count: int = 48) -> str:
    """Images whose brightness tells their class."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=CLASSES)})
    for number, split in enumerate(splits):
        rng = np.random.default_rng(number)
        labels = [place % CLASSES for place in range(count)]
        images = [np.clip(rng.normal(60 + 70 * label, 25, (8, 8, 3)), 0, 255).astype(np.uint8) for label in labels]
        data = Dataset.from_dict({"image": images, "label": labels}, features=features)
        data.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def write_recipe(folder: Path, **keys: Any) -> Path:
    """A recipe with its model and data beside it; `keys` go over the defaults, None takes one away."""
    import yaml

    write_model(folder / "model")
    if not (folder / "data").exists():
        write_data(folder / "data")
    own = {"model": "model", "data": "data", "rates": [1e-2], "num_train_epochs": 2, "use_cpu": True, "seed": 0}
    own |= {"per_device_train_batch_size": 8, "output_dir": str(folder / "run"), **keys}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in own.items() if value is not None}))
    return path
