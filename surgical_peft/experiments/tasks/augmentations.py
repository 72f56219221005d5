"""Augmented copies of an image: AugMix over random crops and flips, as MEMO adapts with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageOps

_CHAINS = 3  # that are mixed
_LONGEST = 3  # operations of a chain
_SHEAR, _DEGREES, _SHIFT = 0.03, 3.0, 1 / 30  # at most; a shift is a share of the image's size
_GRAY = 128


def augmix(image: Image.Image, rng: Generator) -> Image.Image:
    """A random crop of the padded image, perhaps mirrored, mixed with three chains of operations on it.

    Padding is an eighth of the size, black; a chain has one to three operations. The chains are mixed by weights from
    Dirichlet(1, 1, 1), and the mix with the crop by a weight from Beta(1, 1).

    Args:
        image: of mode `L` or `RGB`, any size.
        rng: where all that is random comes from.

    Returns:
        An image of the same mode and size.

    Source: Zhang, Levine and Finn 2021 (arXiv 2110.09506) and its code for CIFAR-10, whose strength of each operation
        this has; AugMix, Hendrycks et al. 2020 (arXiv 1912.02781). Padding and shifts are those for 32 pixels, to
        scale; beyond the edges it is gray in every channel, where the code has its 128 in the first alone.

    Example:
        >>> augmix(image, np.random.default_rng((split, place, draw))).size == image.size
        True
    """
    crop = _cropped(image, rng)
    weights, kept = rng.dirichlet(np.ones(_CHAINS)), rng.beta(1, 1)
    mix = kept * _pixels(crop)
    for weight in weights:
        changed = crop
        for _ in range(rng.integers(1, _LONGEST + 1)):
            changed = OPERATIONS[rng.integers(len(OPERATIONS))](changed, rng)
        mix += (1 - kept) * weight * _pixels(changed)
    return Image.fromarray(np.clip(np.rint(mix), 0, 255).astype(np.uint8))


def _pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)


def _cropped(image: Image.Image, rng: Generator) -> Image.Image:
    width, height = image.size
    across, down = width // 8, height // 8
    left, top = int(rng.integers(2 * across + 1)), int(rng.integers(2 * down + 1))
    padded = ImageOps.expand(image, (across, down))
    crop = padded.crop((left, top, left + width, top + height))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def _level(rng: Generator) -> float:
    return float(rng.uniform(0.1, 1.0))


def _signed(value: float, rng: Generator) -> float:
    return -value if rng.random() < 0.5 else value


def _moved(image: Image.Image, matrix: Sequence[float]) -> Image.Image:
    """The image with each pixel taken from where the matrix leads, gray beyond its edges."""
    gray = (_GRAY,) * len(image.getbands())
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=gray)


def _rotate(image: Image.Image, rng: Generator) -> Image.Image:
    degrees = _signed(int(_level(rng) * _DEGREES), rng)
    gray = (_GRAY,) * len(image.getbands())
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=gray)


def _solarize(image: Image.Image, rng: Generator) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(_level(rng) * 25.6))


def _posterize(image: Image.Image, rng: Generator) -> Image.Image:
    return ImageOps.posterize(image, 4 - int(_level(rng) * 0.4))


def _shear_x(image: Image.Image, rng: Generator) -> Image.Image:
    return _moved(image, (1, _signed(_level(rng) * _SHEAR, rng), 0, 0, 1, 0))


def _shear_y(image: Image.Image, rng: Generator) -> Image.Image:
    return _moved(image, (1, 0, 0, _signed(_level(rng) * _SHEAR, rng), 1, 0))


def _shift_x(image: Image.Image, rng: Generator) -> Image.Image:
    return _moved(image, (1, 0, _signed(int(_level(rng) * _SHIFT * image.width), rng), 0, 1, 0))


def _shift_y(image: Image.Image, rng: Generator) -> Image.Image:
    return _moved(image, (1, 0, 0, 0, 1, _signed(int(_level(rng) * _SHIFT * image.height), rng)))


OPERATIONS: tuple[Callable[[Image.Image, Generator], Image.Image], ...] = (
    lambda image, rng: ImageOps.autocontrast(image),
    lambda image, rng: ImageOps.equalize(image),
    _rotate,
    _solarize,
    _shear_x,
    _shear_y,
    _shift_x,
    _shift_y,
    _posterize,
)
