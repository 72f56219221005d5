"""The corruptions of CIFAR-10-C: those of ImageNet-C, with other constants and for images of 32 x 32 pixels.

Constants and order of operations are those of `ImageNet-C/create_c/make_cifar_c.py` in hendrycks/robustness (Hendrycks
and Dietterich 2019, arXiv 1903.12261), the script that made the published data set. Random numbers are drawn anew, so
that images equal the published ones in distribution, not in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import as_file, files
from io import BytesIO
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

Values = NDArray[Any]  # 32 x 32 x 3
Corrupt = Callable[[Values, Any, Generator], Values]  # pixels and constant; 0 to 255
SIDE = 32


def corrupt(name: str, pixels: NDArray[np.uint8], severity: int, rng: Generator) -> NDArray[np.uint8]:
    """The corruption `name` of CIFAR-10-C.

    Args:
        name: a key of `CIFAR10_C`.
        pixels: uint8 image, 32 x 32 x 3.
        severity: 1 to 5.
        rng: where all randomness comes from; the same state gives the same image.

    Example:
        >>> corrupt("fog", np.zeros((32, 32, 3), np.uint8), 5, np.random.default_rng(0)).shape
        (32, 32, 3)
    """
    function, constants = CIFAR10_C[name]
    return np.clip(function(pixels, constants[severity - 1], rng), 0, 255).astype(np.uint8)


def _gaussian_noise(pixels: Values, scale: float, rng: Generator) -> Values:
    return 255 * np.clip(pixels / 255 + rng.normal(size=pixels.shape, scale=scale), 0, 1)


def _shot_noise(pixels: Values, photons: int, rng: Generator) -> Values:
    return 255 * np.clip(rng.poisson(pixels / 255 * photons) / photons, 0, 1)


def _impulse_noise(pixels: Values, share: float, rng: Generator) -> Values:
    extreme = np.where(rng.random(pixels.shape) < 0.5, 255, 0)
    return np.where(rng.random(pixels.shape) < share, extreme, pixels)


def _speckle_noise(pixels: Values, scale: float, rng: Generator) -> Values:
    return 255 * np.clip(pixels / 255 * (1 + rng.normal(size=pixels.shape, scale=scale)), 0, 1)


def _gaussian_blur(pixels: Values, sigma: float, rng: Generator) -> Values:
    return 255 * np.clip(_blurred(pixels / 255, sigma), 0, 1)


def _glass_blur(pixels: Values, constants: Any, rng: Generator) -> Values:
    from imagecorruptions.corruptions import _shuffle_pixels_njit_glass_blur as shuffle

    sigma, _distance, _rounds = constants
    soft = (_blurred(pixels / 255, sigma) * 255).astype(np.uint8)
    return _gaussian_blur(shuffle(SIDE, SIDE, soft, constants, int(rng.integers(2**31))), sigma, rng)


def _defocus_blur(pixels: Values, constants: Any, rng: Generator) -> Values:
    import cv2
    from imagecorruptions.corruptions import disk

    radius, blur_of_edge = constants
    kernel = disk(radius, blur_of_edge)
    return 255 * np.clip(np.stack([cv2.filter2D(each, -1, kernel) for each in _channels(pixels / 255)], -1), 0, 1)


def _motion_blur(pixels: Values, constants: Any, rng: Generator) -> Values:
    radius, sigma = constants
    return _moved(pixels, radius, sigma, rng.uniform(-45, 45))


def _zoom_blur(pixels: Values, largest: float, rng: Generator) -> Values:
    scaled = (pixels / 255).astype(np.float32)
    layers = [scaled, *(_zoomed(scaled, factor) for factor in np.arange(1, largest, 0.01))]
    return 255 * np.clip(np.mean(layers, axis=0), 0, 1)


def _snow(pixels: Values, constants: Any, rng: Generator) -> Values:
    import cv2

    mean, deviation, zoom, threshold, radius, sigma, left = constants
    image = (pixels / 255).astype(np.float32)
    layer = _zoomed(rng.normal(size=(SIDE, SIDE, 1), loc=mean, scale=deviation), zoom).squeeze()
    still = (255 * np.clip(np.where(layer < threshold, 0, layer), 0, 1)).astype(np.uint8)
    flakes = (_moved(still, radius, sigma, rng.uniform(-135, -45)).round() / 255)[..., None]
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    whiter = left * image + (1 - left) * np.maximum(image, gray * 1.5 + 0.5)
    return 255 * np.clip(whiter + flakes + np.rot90(flakes, k=2), 0, 1)


def _frost(pixels: Values, constants: Any, rng: Generator) -> Values:
    frost = _frosts()[rng.integers(5)]  # the script draws among five of its six
    top, left = (int(rng.integers(side - SIDE)) for side in frost.shape[:2])
    of_image, of_frost = constants
    return of_image * pixels + of_frost * frost[top : top + SIDE, left : left + SIDE]


def _fog(pixels: Values, constants: Any, rng: Generator) -> Values:
    from imagecorruptions.corruptions import plasma_fractal

    weight, decay = constants
    with seeded(int(rng.integers(2**31))):
        fractal = plasma_fractal(SIDE, decay)[..., None]
    image = pixels / 255
    brightest = image.max()
    return 255 * np.clip((image + weight * fractal) * brightest / (brightest + weight), 0, 1)


def _brightness(pixels: Values, added: float, rng: Generator) -> Values:
    return _in_hsv(pixels, 2, 1, added)


def _saturate(pixels: Values, constants: Any, rng: Generator) -> Values:
    factor, added = constants
    return _in_hsv(pixels, 1, factor, added)


def _contrast(pixels: Values, left: float, rng: Generator) -> Values:
    means = (pixels / 255).mean(axis=(0, 1), keepdims=True)
    return 255 * np.clip((pixels / 255 - means) * left + means, 0, 1)


def _elastic_transform(pixels: Values, constants: Any, rng: Generator) -> Values:
    import cv2
    from scipy.ndimage import gaussian_filter, map_coordinates

    strength, sigma, affine = (SIDE * constant for constant in constants)
    middle, arm = SIDE // 2, SIDE // 3
    corners = np.array([[middle + arm] * 2, [middle + arm, middle - arm], [middle - arm] * 2], dtype=np.float32)
    moved = (corners + rng.uniform(-affine, affine, size=corners.shape)).astype(np.float32)
    image = cv2.warpAffine(
        (pixels / 255).astype(np.float32),
        cv2.getAffineTransform(corners, moved),
        (SIDE, SIDE),
        borderMode=cv2.BORDER_REFLECT_101,
    )
    right, down = (
        strength * gaussian_filter(rng.uniform(-1, 1, size=(SIDE, SIDE)), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    )
    rows, columns = np.mgrid[:SIDE, :SIDE]
    places = np.stack([rows + down, columns + right])
    channels = [map_coordinates(each, places, order=1, mode="reflect") for each in _channels(image)]
    return 255 * np.clip(np.stack(channels, -1), 0, 1)


def _pixelate(pixels: Values, left: float, rng: Generator) -> Values:
    small = Image.fromarray(pixels).resize((int(SIDE * left),) * 2, Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BOX))


def _jpeg_compression(pixels: Values, quality: int, rng: Generator) -> Values:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _spatter(pixels: Values, constants: Any, rng: Generator) -> Values:
    mean, deviation, sigma, threshold, strength, is_mud = constants
    layer = _blurred(rng.normal(size=(SIDE, SIDE), loc=mean, scale=deviation), sigma, channel_axis=None)
    layer[layer < threshold] = 0
    if is_mud:
        mud = _blurred((layer > threshold).astype(np.float32), strength, channel_axis=None)
        mud = np.where(mud < 0.8, 0, mud)[..., None]
        return 255 * np.clip(pixels / 255 * (1 - mud) + np.array([63, 42, 20]) / 255 * mud, 0, 1)
    drops = _drops((layer * 255).astype(np.uint8))[..., None]
    drops = strength * drops / drops.max() if drops.any() else drops
    return 255 * np.clip(pixels / 255 + np.array([175, 238, 238]) / 255 * drops, 0, 1)


def _drops(liquid: NDArray[np.uint8]) -> Values:
    """The light on drops of water."""
    import cv2

    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    _, distance = cv2.threshold(distance, 20, 20, cv2.THRESH_TRUNC)
    flat = cv2.equalizeHist(cv2.blur(distance, (3, 3)).astype(np.uint8))
    light = cv2.filter2D(flat, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    return liquid * cv2.blur(light, (3, 3)).astype(np.float32)


def _blurred(image: Values, sigma: float, channel_axis: int | None = -1) -> Values:
    from skimage.filters import gaussian

    return np.asarray(gaussian(image, sigma=sigma, channel_axis=channel_axis))


def _moved(pixels: Values, radius: int, sigma: float, angle: float) -> Values:
    """A motion blur as ImageMagick makes it, which the script calls."""
    from imagecorruptions.corruptions import _motion_blur

    return np.clip(_motion_blur(pixels, radius=radius, sigma=sigma, angle=angle), 0, 255)


def _zoomed(image: Values, factor: float) -> Values:
    """The middle of an image, enlarged to its size."""
    from scipy.ndimage import zoom

    side = int(np.ceil(SIDE / factor))
    top = (SIDE - side) // 2
    larger = zoom(image[top : top + side, top : top + side], (factor, factor, 1), order=1)
    trim = (larger.shape[0] - SIDE) // 2
    return np.asarray(larger[trim : trim + SIDE, trim : trim + SIDE])


def _in_hsv(pixels: Values, channel: int, factor: float, added: float) -> Values:
    from skimage.color import hsv2rgb, rgb2hsv

    image = rgb2hsv(pixels / 255)
    image[..., channel] = np.clip(image[..., channel] * factor + added, 0, 1)
    return 255 * np.clip(hsv2rgb(image), 0, 1)


def _channels(image: Values) -> list[Values]:
    return [image[..., channel] for channel in range(3)]


@cache
def _frosts() -> list[Values]:
    """The pictures of frost at a fifth of their size, in RGB."""
    import cv2

    names = [f"frost{number}.{'png' if number < 4 else 'jpg'}" for number in range(1, 6)]
    pictures = []
    for name in names:
        with as_file(files("imagecorruptions") / "frost" / name) as path:
            picture: Any = cv2.imread(str(path))
        pictures.append(cv2.resize(picture, (0, 0), fx=0.2, fy=0.2)[..., ::-1])
    return pictures


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator, which the library draws from, seeded and put back afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


# The function of each, and its constant by severity: what the numbers of one are is written where they are unpacked.
CIFAR10_C: dict[str, tuple[Corrupt, tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (
        _spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}
