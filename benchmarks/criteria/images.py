"""The image shifts: the three target draws of Fashion-MNIST in `recipes/`, with pixels or labels changed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from transformers import AutoImageProcessor

from surgical_peft.experiments.shifts import gaussian_noise

RECIPES = Path(__file__).parents[2] / "recipes" / "fashion_mnist"
SEVERITY = 5  # of the noise
CONTRAST = 0.1
BLUR_RADIUS = 3.0  # pixels of 28
COARSE = 7  # pixels of 28 that are left of each side
HIDDEN = 14  # pixels of 28: the side of the black square
SPOILT = 0.3  # of the pixels, turned black or white
MOVED = 6  # pixels of 28, down and to the right
SMALL = 14  # pixels of 28: the side of an image that is zoomed out
SHEAR = 0.5  # pixels to the right for each pixel up from the middle
LEFT_OUT = -1  # as the label of a class: its images are not used

Pixels = NDArray[np.uint8]


def low_contrast(pixels: Pixels) -> Pixels:
    """Pixels drawn towards their mean, as the corruption `contrast` of ImageNet-C does."""
    mean = pixels.mean()
    return np.clip((pixels - mean) * CONTRAST + mean, 0, 255).astype(np.uint8)


def blurred(pixels: Pixels) -> Pixels:
    """Gaussian blur."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(BLUR_RADIUS)))


def pixelated(pixels: Pixels) -> Pixels:
    """Coarse pixels, each the mean of those under it."""
    image = Image.fromarray(pixels)
    return np.asarray(
        image.resize((COARSE, COARSE), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)
    )


def occluded(pixels: Pixels, rng: Generator) -> Pixels:
    """A black square at a random place."""
    top, left = rng.integers(0, [side - HIDDEN + 1 for side in pixels.shape])
    changed = pixels.copy()
    changed[top : top + HIDDEN, left : left + HIDDEN] = 0
    return changed


def spoilt(pixels: Pixels, rng: Generator) -> Pixels:
    """Some pixels black, some white."""
    drawn = rng.random(pixels.shape)
    return np.where(drawn < SPOILT / 2, 0, np.where(drawn < SPOILT, 255, pixels)).astype(np.uint8)


def moved(pixels: Pixels) -> Pixels:
    """Moved towards a corner, black where nothing is left."""
    changed = np.zeros_like(pixels)
    changed[MOVED:, MOVED:] = pixels[:-MOVED, :-MOVED]
    return changed


def zoomed_out(pixels: Pixels) -> Pixels:
    """Half as large, in the middle of black."""
    small = Image.fromarray(pixels).resize((SMALL, SMALL), Image.Resampling.BOX)
    changed = np.zeros_like(pixels)
    edge = (len(pixels) - SMALL) // 2
    changed[edge : edge + SMALL, edge : edge + SMALL] = small
    return changed


def sheared(pixels: Pixels) -> Pixels:
    """Slanted, the middle row where it was."""
    image = Image.fromarray(pixels)
    middle = len(pixels) / 2
    return np.asarray(
        image.transform(
            image.size, Image.Transform.AFFINE, (1, SHEAR, -SHEAR * middle, 0, 1, 0), Image.Resampling.BILINEAR
        )
    )


def posterised(pixels: Pixels) -> Pixels:
    """Black or white."""
    return np.where(pixels > 127, 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class ImageShift:
    """What a shift does to an image and its label.

    Attributes:
        change: gives the new pixels; the generator is the image's own.
        labels: the new label of each of the ten classes, or `LEFT_OUT`.
        source: folder of the source model in `recipes/fashion_mnist/`.
    """

    change: Callable[[Pixels, Generator], Pixels] = lambda pixels, rng: pixels
    labels: tuple[int, ...] = tuple(range(10))
    source: str = "vit"


REVERSED = tuple(range(9, -1, -1))
CYCLIC = (*range(1, 10), 0)
CYCLIC_TOPS = (2, 1, 4, 3, 6, 5, 0, 7, 8, 9)  # T-shirt, pullover, coat, shirt
SWAPPED = (0, 7, 9, 3, 4, 5, 6, 1, 8, 2)  # trouser and sneaker, pullover and ankle boot
# Dress (3) is the unseen rest of the body, coat (4) and shirt (6) the unseen tops, ankle boot (9) the unseen shoe; the
# labels are those of SUPERCLASSES in make_source.py.
SUBCLASSES = (-1, -1, -1, 2, 0, -1, 0, -1, -1, 1)
IMAGE_SHIFTS = {
    "noise": ImageShift(lambda pixels, rng: gaussian_noise(pixels, SEVERITY, rng)),
    "label map": ImageShift(labels=REVERSED),
    "subclass": ImageShift(labels=SUBCLASSES, source="vit-superclass"),
    "contrast": ImageShift(lambda pixels, rng: low_contrast(pixels)),
    "cyclic labels": ImageShift(labels=CYCLIC),
    "inverted": ImageShift(lambda pixels, rng: 255 - pixels),
    "rotated": ImageShift(lambda pixels, rng: np.rot90(pixels)),
    "blur": ImageShift(lambda pixels, rng: blurred(pixels)),
    "swapped labels": ImageShift(labels=SWAPPED),
    "noise and label map": ImageShift(lambda pixels, rng: gaussian_noise(pixels, SEVERITY, rng), REVERSED),
    "pixelated": ImageShift(lambda pixels, rng: pixelated(pixels)),
    "occluded": ImageShift(occluded),
    "contrast and cyclic labels": ImageShift(lambda pixels, rng: low_contrast(pixels), CYCLIC),
    "noise and subclass": ImageShift(
        lambda pixels, rng: gaussian_noise(pixels, SEVERITY, rng), SUBCLASSES, "vit-superclass"
    ),
    "upside down": ImageShift(lambda pixels, rng: pixels[::-1]),
    "spoilt pixels": ImageShift(spoilt),
    "moved": ImageShift(lambda pixels, rng: moved(pixels)),
    "cyclic tops": ImageShift(labels=CYCLIC_TOPS),
    "inverted and cyclic labels": ImageShift(lambda pixels, rng: 255 - pixels, CYCLIC),
    "blur and swapped labels": ImageShift(lambda pixels, rng: blurred(pixels), SWAPPED),
    "rotated and noise": ImageShift(lambda pixels, rng: gaussian_noise(np.rot90(pixels), SEVERITY, rng)),
    "occluded and subclass": ImageShift(occluded, SUBCLASSES, "vit-superclass"),
    "edges": ImageShift(lambda pixels, rng: np.asarray(Image.fromarray(pixels).filter(ImageFilter.FIND_EDGES))),
    "striped": ImageShift(lambda pixels, rng: np.where(np.arange(pixels.shape[1]) % 3, pixels, 0).astype(np.uint8)),
    "sandals and sneakers": ImageShift(labels=(0, 1, 2, 3, 4, 7, 6, 5, 8, 9)),
    "bright and label map": ImageShift(lambda pixels, rng: pixels // 2 + 128, REVERSED),
    "pixelated and cyclic labels": ImageShift(lambda pixels, rng: pixelated(pixels), CYCLIC),
    "upside down and swapped labels": ImageShift(lambda pixels, rng: pixels[::-1], SWAPPED),
    "moved and inverted": ImageShift(lambda pixels, rng: 255 - moved(pixels)),
    "spoilt pixels and subclass": ImageShift(spoilt, SUBCLASSES, "vit-superclass"),
    "zoomed out": ImageShift(lambda pixels, rng: zoomed_out(pixels)),
    "posterised": ImageShift(lambda pixels, rng: posterised(pixels)),
    "cyclic shoes": ImageShift(labels=(0, 1, 2, 3, 4, 7, 6, 9, 8, 5)),  # sandal, sneaker, ankle boot
    "posterised and cyclic labels": ImageShift(lambda pixels, rng: posterised(pixels), CYCLIC),
    "zoomed out and swapped labels": ImageShift(lambda pixels, rng: zoomed_out(pixels), SWAPPED),
    "sheared and label map": ImageShift(lambda pixels, rng: sheared(pixels), REVERSED),
    "dark and cyclic tops": ImageShift(lambda pixels, rng: pixels // 4, CYCLIC_TOPS),
    "mirrored and subclass": ImageShift(lambda pixels, rng: pixels[:, ::-1], SUBCLASSES, "vit-superclass"),
}


def source(shift: str) -> Path:
    """Folder of the source model of a shift."""
    return RECIPES / IMAGE_SHIFTS[shift].source


def splits(shift: str, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Train, validation and test images of draw `seed` as the model takes them."""
    what = IMAGE_SHIFTS[shift]
    processor = AutoImageProcessor.from_pretrained(source(shift), backend="pil")
    prepared = {}
    for split, data in datasets.load_dataset(str(RECIPES / f"target-{seed}")).items():
        labels = np.array([what.labels[label] for label in data["label"]])
        # As in surgical_peft.experiments.tasks: the noise on an image depends on its place and split alone.
        noise = zlib.crc32(split.encode())
        pixels = [
            what.change(np.asarray(image), np.random.default_rng((noise, index)))[..., None]
            for index, image in enumerate(data["image"])
        ]
        values = processor(pixels, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        kept = torch.tensor(labels != LEFT_OUT)
        prepared[split] = {"pixel_values": values[kept], "labels": torch.tensor(labels)[kept]}
    return prepared
