"""Shifts of image data, to study on purpose: each is deterministic by its seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from .errors import SurgicalError
from .names import nearest

Pixels = NDArray[np.uint8]


def gaussian_noise(pixels: Pixels, severity: int, rng: Generator) -> Pixels:
    """Additive Gaussian noise as in ImageNet-C.

    Args:
        pixels: uint8 image of any shape, 0 to 255.
        severity: 1 to 5, i.e. a standard deviation of .08, .12, .18, .26 or .38 of the full range.
        rng: where the noise comes from.

    Source: Hendrycks and Dietterich 2019 (arXiv 1903.12261) and its code, `gaussian_noise` of ImageNet-C.
    """
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    noisy = pixels / 255.0 + rng.normal(size=pixels.shape, scale=scale)
    return (np.clip(noisy, 0, 1) * 255).astype(np.uint8)


CORRUPTIONS: dict[str, Callable[[Pixels, int, Generator], Pixels]] = {"gaussian_noise": gaussian_noise}


def corruption(name: str, severity: int) -> Callable[[Pixels, Generator], Pixels]:
    """The corruption `name` at `severity` (1 to 5), as a function of pixels and generator.

    Raises:
        SurgicalError: unknown name, or severity out of range.
    """
    if name not in CORRUPTIONS:
        raise SurgicalError(
            f"corruption {name!r} is unknown: {nearest(name, CORRUPTIONS)}There are: {', '.join(CORRUPTIONS)}."
        )
    if severity not in range(1, 6):
        raise SurgicalError(f"severity={severity} is out of range: 1 to 5.")
    return lambda pixels, rng: CORRUPTIONS[name](pixels, severity, rng)
