"""What a recipe's model and data are: one function a task."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from datasets import ClassLabel, DatasetDict, Image, load_dataset
from PIL import Image as PILImage
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from .errors import SurgicalError
from .names import nearest
from .recipe import Recipe
from .shifts import corruption

SPLITS = ("train", "validation", "test")


class Examples(Protocol):
    """Examples as a model takes them; a list of them will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]: ...


@dataclass(frozen=True)
class Task:
    """A model to load and data to tune it on.

    Attributes:
        load_model: gives the source model, freshly loaded.
        splits: train, validation and test: examples as the model takes them, with `labels`.
    """

    load_model: Callable[[], nn.Module]
    splits: dict[str, Examples]


def load_task(recipe: Recipe) -> Task:
    """The task of a recipe.

    Raises:
        SurgicalError: unknown task; model or data that cannot be found or do not fit the task.
    """
    if recipe.task not in TASKS:
        raise SurgicalError(
            f"task {recipe.task!r} is unknown: {nearest(recipe.task, TASKS)}There are: {', '.join(TASKS)}."
        )
    return TASKS[recipe.task](recipe)


def image_classification(recipe: Recipe) -> Task:
    """Images with class labels, and a model that `AutoModelForImageClassification` loads."""
    config = _found(AutoConfig.from_pretrained, recipe.model, "model")
    processor = _found(AutoImageProcessor.from_pretrained, recipe.model, "image processor of", backend="pil")
    data = _found(load_dataset, recipe.data, "data set")
    _check_splits(data, recipe)
    features = data["train"].features
    image = next((name for name, feature in features.items() if isinstance(feature, Image)), None)
    label = next((name for name, feature in features.items() if isinstance(feature, ClassLabel)), None)
    if image is None or label is None:
        raise SurgicalError(f"{recipe.data} needs an Image and a ClassLabel column; it has {dict(features)}.")
    classes = features[label].num_classes
    label_map = list(range(classes)) if recipe.label_map is None else recipe.label_map
    if len(label_map) != classes or any(new not in range(config.num_labels) for new in label_map):
        raise SurgicalError(
            f"label_map={recipe.label_map} does not fit: it needs {classes} entries, one for each class of the data, "
            f"each a label of the model, 0 to {config.num_labels - 1}."
        )
    corrupt = corruption(recipe.corruption, recipe.severity) if recipe.corruption else None
    splits: dict[str, Examples] = {
        split: _Images(data[split], image, label, processor, label_map, corrupt, zlib.crc32(split.encode()))
        for split in SPLITS
    }
    return Task(lambda: _found(AutoModelForImageClassification.from_pretrained, recipe.model, "model"), splits)


TASKS: dict[str, Callable[[Recipe], Task]] = {"image_classification": image_classification}


@dataclass(frozen=True)
class _Images(Dataset[dict[str, torch.Tensor]]):
    """Images of one split as the model takes them; the noise on an image depends on its place and split alone."""

    data: Any
    image: str
    label: str
    processor: Any
    label_map: list[int]
    corrupt: Callable[..., Any] | None
    seed: int

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.data[index]
        image = row[self.image]
        if self.corrupt is not None:
            rng = np.random.default_rng((self.seed, index))
            image = PILImage.fromarray(self.corrupt(np.asarray(image), rng))
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": torch.tensor(self.label_map[row[self.label]])}


def model_of_config(model: str) -> nn.Module:
    """The architecture of a model folder or Hub id, without its weights (on the meta device)."""
    config = _found(AutoConfig.from_pretrained, model, "model")
    names = config.architectures or []
    architecture = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        return architecture(config) if architecture else transformers.AutoModel.from_config(config)


def _check_splits(data: Any, recipe: Recipe) -> None:
    if not isinstance(data, DatasetDict) or not set(SPLITS) <= data.keys():
        raise SurgicalError(f"{recipe.data} has the splits {', '.join(data)}; it needs {', '.join(SPLITS)}.")
    for split in SPLITS:
        if not len(data[split]):
            raise SurgicalError(f"{recipe.data}: the split {split} is empty.")


def _found(load: Callable[..., Any], name: str, what: str, **kwargs: Any) -> Any:
    """`load(name)`, with one kind of error for all the ways in which transformers and datasets miss something."""
    try:
        return load(name, **kwargs)
    except (OSError, ValueError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "the folder" if Path(name).exists() else "neither a folder here nor to be had from the Hub now:"
        raise SurgicalError(f"the {what} {name!r} cannot be loaded: {kind} {reason}") from error
