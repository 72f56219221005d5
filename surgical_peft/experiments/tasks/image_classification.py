"""Images with class labels."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Image
from PIL import Image as PILImage
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
)

from ...errors import SurgicalError
from ..recipe.recipe import Recipe
from ..shifts import corruption
from .augmentations import augmix
from .cells import image_faults
from .columns import ColumnType
from .dataset import open_data
from .source_model import model_loader
from .targets import load_with_loss, target_of
from .task import Examples, Task, TinyTask, load_pretrained, with_info
from .tiny_data import label_feature, labels_of
from .unlabelled import Copies, ReadImages, Stream, check_unlabelled, summary_of

MODES = {1: "L", 3: "RGB"}
IMAGE = ColumnType("images", lambda feature: isinstance(feature, Image), image_faults)


def _row(place: int, rng: np.random.Generator, classes: list[str]) -> dict[str, Any]:
    """An image whose brightness tells its class."""
    label = place % len(classes)
    middle = 40 + 175 * label / max(1, len(classes) - 1)
    return {"image": np.clip(rng.normal(middle, 25, (32, 32, 3)), 0, 255).astype(np.uint8), "label": label}


def _save_processor(config: Any, folder: Path) -> None:
    size, middle = getattr(config, "image_size", 32), [0.5] * getattr(config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    sizes = {"height": height, "width": width}
    ViTImageProcessorPil(size=sizes, image_mean=middle, image_std=middle).save_pretrained(folder)


@with_info(
    keys=["unlabelled", "corruption", "label_map", "imbalance", "new_head", "problem_type", "class_weights"],
    pipeline="image-classification",
    tiny=TinyTask(
        AutoModelForImageClassification,
        {"image": lambda classes: Image(), "label": label_feature},
        _row,
        _save_processor,
        labels_of,
    ),
)
def image_classification(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Images with class labels, and a model that `AutoModelForImageClassification` loads.

    Columns: `image` and `label`. Metrics: `accuracy` (default), `macro_f1`, `matthews_correlation`; with
    `problem_type` those of its target. Images of any mode are converted to as many channels as the model takes. With
    `unlabelled` the training split needs no `label`, and its examples are augmented copies of each image.
    """
    check_unlabelled(recipe)
    target = target_of(recipe)
    measure = target.measure(recipe.metric)
    config = load_pretrained(AutoConfig.from_pretrained, recipe, "model")
    processor = load_pretrained(AutoImageProcessor.from_pretrained, recipe, "image processor of", backend="pil")
    corrupt = corruption(recipe.corruption, recipe.severity) if recipe.corruption else None
    data = open_data(recipe, splits, {"image": IMAGE, "label": target.column}, target.classes)
    labeled = target.label_rows(recipe, data, config)
    examples: dict[str, Examples] = {}
    shape = None
    for split, rows in data.splits.items():
        images = _Images(
            rows.select_columns(data.columns["image"]),
            data.columns["image"],
            labeled.rows[split],
            labeled.labels[split],
            processor,
            MODES.get(getattr(config, "num_channels", 3), "RGB"),
            shape,
            corrupt,
            (zlib.crc32(split.encode()), recipe.shift_seed),
            f"{recipe.data}, split {split}",
        )
        if shape is None:
            shape = tuple(images[0]["pixel_values"].shape)
            _check_shape(config, shape, recipe)
        images = replace(images, shape=shape)
        make = partial(images.copies, recipe.copies)
        if recipe.unlabelled and split == "train":
            examples[split] = Copies(images, make)
        else:
            examples[split] = Stream(images, make) if recipe.is_online else images
    if recipe.is_online:
        measure = replace(measure, read=ReadImages(measure.read))
    return Task(
        load_model=load_with_loss(
            model_loader(AutoModelForImageClassification, recipe, labeled.count, labeled.names),
            recipe,
            labeled.weights,
        ),
        splits=examples,
        collate=default_data_collator,
        processor=processor,
        metric=recipe.metric or target.metrics[0],
        measure=measure,
        names_labels=labeled.count > 1,
        summary=data.summary + labeled.summary + summary_of(recipe),
    )


def _check_shape(config: Any, shape: tuple[int, ...], recipe: Recipe) -> None:
    """Have the model, without its weights, say whether it takes images of that shape."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=recipe.allow_code).eval()
        pixels = torch.zeros(1, *shape)
    try:
        model(pixel_values=pixels)
    except ValueError as error:
        raise SurgicalError(
            f"{recipe.model} does not take the images that its image processor makes of {recipe.data}, with "
            f"{shape[0]} x {shape[1]} x {shape[2]} values (channels, height, width): {error} Resize the "
            "images, or set do_resize and size in the model's preprocessor_config.json."
        ) from error


@dataclass(frozen=True)
class _Images(Dataset[dict[str, torch.Tensor]]):
    """Images of one split as the model takes them; noise on one depends on its place, the split and the seed alone."""

    data: Any
    column: str
    rows: list[int]
    labels: list[Any]
    processor: Any
    mode: str
    shape: tuple[int, ...] | None
    corrupt: Callable[..., Any] | None
    seeds: tuple[int, int]
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self._processed(index, [self._image(index)])[0]
        return {"pixel_values": pixels, "labels": torch.tensor(self.labels[index])}

    def copies(self, count: int, index: int) -> torch.Tensor:
        """Augmented copies of an image: (copies, channels, height, width).

        They depend on its place, the split, the seed and their number alone.
        """
        image, (split, seed) = self._image(index), self.seeds
        rngs = [np.random.default_rng((split, self.rows[index], seed, 1 + draw)) for draw in range(count)]
        return self._processed(index, [augmix(image, rng) for rng in rngs])

    def _image(self, index: int) -> PILImage.Image:
        """The image before the processor, with its corruption."""
        place = self.rows[index]
        image = convert(self.data[place][self.column], self.mode)  # each was read when the cells were checked
        if self.corrupt is None:
            return image
        split, seed = self.seeds
        rng = np.random.default_rng((split, place, seed))  # with seed 0 the same as without it
        return PILImage.fromarray(self.corrupt(np.asarray(image), rng))

    def _processed(self, index: int, images: list[PILImage.Image]) -> torch.Tensor:
        pixels: torch.Tensor = self.processor(images, return_tensors="pt")["pixel_values"]
        if self.shape is not None and tuple(pixels.shape[1:]) != self.shape:
            raise SurgicalError(
                f"{self._named(self.rows[index])} has {images[0].height} x {images[0].width} pixels, another size "
                "than the first, and the model's image processor leaves it so: resize the images, or set do_resize "
                "and size in its preprocessor_config.json."
            )
        return pixels

    def _named(self, place: int) -> str:
        """An image in words: data set, split, row, and its file where it has one."""
        stored = self.data.cast_column(self.column, Image(decode=False))[place][self.column]
        file = f" ({stored['path']})" if stored["path"] else ""
        return f"{self.where}: the image of row {place}{file}"


def convert(image: PILImage.Image, mode: str) -> PILImage.Image:
    """The image in another mode; 16 bits a pixel become 8, what is transparent becomes white."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I"):  # Pillow would cut such values off at 255
        deep = np.asarray(image).astype(np.int64)
        image = PILImage.fromarray((np.clip(deep, 0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise SurgicalError("an image has floating point pixels, whose range is not known: save it with 8 or 16 bits.")
    if image.has_transparency_data:
        whole = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", whole.size, "white"), whole)
    return image.convert(mode)
