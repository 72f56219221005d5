"""The corruptions of ImageNet-C and of CIFAR-10-C, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from ...errors import SurgicalError
from ...validation import check_choice, check_count
from .cifar10_c import CIFAR10_C, SIDE, corrupt, seeded

Pixels = NDArray[np.uint8]
Corruption = Callable[[Pixels, int, Generator], Pixels]  # with a severity of 1 to 5


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


def contrast(pixels: Pixels, severity: int, rng: Generator) -> Pixels:
    """Pixels drawn towards the mean of their channel, as in ImageNet-C.

    Args:
        pixels: uint8 image, height x width or height x width x channels, 0 to 255.
        severity: 1 to 5; .4, .3, .2, .1 or .05 of the contrast is left.
        rng: not used.

    Source: Hendrycks and Dietterich 2019 (arXiv 1903.12261) and its code, `contrast` of ImageNet-C.
    """
    left = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    scaled = pixels / 255.0
    means = scaled.mean(axis=(0, 1), keepdims=True)
    return (np.clip((scaled - means) * left + means, 0, 1) * 255).astype(np.uint8)


_WITHOUT_LIBRARY = ("gaussian_noise", "contrast")
_SEEDED = ("glass_blur", "impulse_noise")  # take a seed of their own; all others use NumPy's global one
_BY_LIBRARY = (
    *("shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "fog"),
    *("brightness", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),  # the four extra ones
)


def _by_library(name: str) -> Corruption:
    def in_color(pixels: Pixels, severity: int, rng: Generator) -> Pixels:
        seed = int(rng.integers(2**31))
        with seeded(seed):
            changed = _library()[name](
                Image.fromarray(pixels), severity, **({"seed": seed} if name in _SEEDED else {})
            )
        return np.asarray(changed).astype(np.uint8)

    return _also_gray(in_color)


def _of_cifar10_c(name: str) -> Corruption:
    def in_color(pixels: Pixels, severity: int, rng: Generator) -> Pixels:
        if pixels.shape[:2] != (SIDE, SIDE):
            raise SurgicalError(
                f"cifar10_c/{name} is made for images of {SIDE} x {SIDE} pixels, and this one has {pixels.shape[0]} x "
                f"{pixels.shape[1]}: take {name}, which is made for larger ones."
            )
        return corrupt(name, pixels, severity, rng)

    return _also_gray(in_color)


def _also_gray(in_color: Corruption) -> Corruption:
    """A corruption of color images for gray ones, too."""

    def corrupt_any(pixels: Pixels, severity: int, rng: Generator) -> Pixels:
        if pixels.ndim == 3:
            return in_color(pixels, severity, rng)
        # A mean over the channels would average their noise out.
        return in_color(np.stack([pixels] * 3, axis=-1), severity, rng)[..., 0]

    return corrupt_any


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "contrast": contrast,
    **{name: _by_library(name) for name in _BY_LIBRARY},
    **{f"cifar10_c/{name}": _of_cifar10_c(name) for name in CIFAR10_C},
}


def corruption(name: str, severity: int) -> Callable[[Pixels, Generator], Pixels]:
    """The corruption `name` at `severity` (1 to 5), as a function of pixels and generator.

    `gaussian_noise` and `contrast` are ours, the other 17 come from the package `imagecorruptions-imaug`. All are made
    for images of 224 pixels: on small images the blurs reach across much of the image. With `cifar10_c/` before its
    name a corruption is that of CIFAR-10-C, for images of 32 x 32 pixels, and milder. Of a gray image corrupted in
    color, the red channel is kept.

    Raises:
        SurgicalError: unknown name, severity out of range, or the package is missing.

    Example:
        >>> corruption("contrast", 5)(np.zeros((28, 28), np.uint8), np.random.default_rng(0)).shape
        (28, 28)
    """
    check_choice("images", "corruption", name, CORRUPTIONS)
    check_count(name, "severity", severity, "how strong it is", at_most=5)
    if name not in _WITHOUT_LIBRARY:
        _library()  # that it is missing is said now, not at the first image
    return lambda pixels, rng: CORRUPTIONS[name](pixels, severity, rng)


def _library() -> dict[str, Callable[..., Any]]:
    try:
        from imagecorruptions import corruption_dict
    except ImportError as error:
        raise SurgicalError(
            f"this corruption needs a package that is not here: pip install 'surgical-peft[shifts]' ({error}). "
            "Without it there are gaussian_noise and contrast."
        ) from error
    return corruption_dict
