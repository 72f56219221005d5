"""The corruptions of CIFAR-10-C, some of them beside the formulas of make_cifar_c.py with the randomness handed in."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from surgical_peft import SurgicalError
from surgical_peft.experiments.shifts import CORRUPTIONS, corruption
from surgical_peft.experiments.shifts.cifar10_c import CIFAR10_C

NAMES = tuple(f"cifar10_c/{name}" for name in CIFAR10_C)
IMAGE = np.add.outer(np.add.outer(3 * np.arange(32), 2 * np.arange(32)), [0, 40, 90]).astype(np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def corrupted(name: str, severity: int = 5, seed: int = 3, image: np.ndarray = IMAGE) -> np.ndarray:
    return corruption(f"cifar10_c/{name}", severity)(image, rng(seed))


def test_each_has_one_of_imagenet_c_beside_it() -> None:
    assert {name.removeprefix("cifar10_c/") for name in NAMES} == {name for name in CORRUPTIONS if "/" not in name}


@pytest.mark.parametrize("name", CIFAR10_C)
def test_deterministic_by_the_generator_alone(name: str) -> None:
    before, state = IMAGE.copy(), np.random.get_state()[1].tolist()
    first = corrupted(name)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert not np.array_equal(first, IMAGE) and np.array_equal(IMAGE, before)
    assert np.random.get_state()[1].tolist() == state
    np.random.seed(5)
    assert np.array_equal(first, corrupted(name))
    draws_nothing = name in {
        *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"),
        "saturate",
    }
    assert np.array_equal(first, corrupted(name, seed=4)) == draws_nothing
    gray = corrupted(name, image=IMAGE[..., 0])
    assert gray.shape == (32, 32) and gray.dtype == np.uint8


@pytest.mark.parametrize("name", CIFAR10_C)
def test_the_highest_severity_moves_more_than_the_lowest(name: str) -> None:
    def distance(severity: int) -> float:
        moved = [np.abs(corrupted(name, severity, seed).astype(float) - IMAGE).mean() for seed in range(10)]
        return float(np.mean(moved))

    is_different = name in {"elastic_transform", "saturate", "spatter"}  # other kinds by severity, not more of one
    assert distance(5) > (0 if is_different else distance(1))


def test_milder_than_on_large_images() -> None:
    small, large = (np.abs(corruption(name, 5)(IMAGE, rng()).astype(float) - IMAGE).mean() for name in
                    ("cifar10_c/gaussian_noise", "gaussian_noise"))  # fmt: skip
    assert small < large / 2


@pytest.mark.parametrize("severity", range(1, 6))
def test_noises_are_those_of_the_script(severity: int) -> None:
    x = IMAGE / 255.0
    c = [0.04, 0.06, 0.08, 0.09, 0.10][severity - 1]
    expected = np.clip(x + rng(3).normal(size=x.shape) * c, 0, 1) * 255
    assert np.array_equal(corrupted("gaussian_noise", severity), np.uint8(expected))
    c = [500, 250, 100, 75, 50][severity - 1]
    expected = np.clip(rng(3).poisson(x * c) / c, 0, 1) * 255
    assert np.array_equal(corrupted("shot_noise", severity), np.uint8(expected))
    c = [0.06, 0.1, 0.12, 0.16, 0.2][severity - 1]
    expected = np.clip(x + x * rng(3).normal(size=x.shape) * c, 0, 1) * 255
    assert np.abs(corrupted("speckle_noise", severity).astype(int) - np.uint8(expected)).max() <= 1  # of rounding
    share = [0.01, 0.02, 0.03, 0.05, 0.07][severity - 1]
    flat = np.full((32, 32, 3), 100, np.uint8)
    changed = np.stack([corrupted("impulse_noise", severity, seed, flat) for seed in range(20)])
    assert (changed != 100).mean() == pytest.approx(share, rel=0.1)
    assert set(np.unique(changed)) == {0, 100, 255} and (changed == 255).sum() == pytest.approx(
        (changed == 0).sum(), rel=0.2
    )


@pytest.mark.parametrize("severity", range(1, 6))
def test_digital_ones_are_those_of_the_script(severity: int) -> None:
    x, image = IMAGE / 255.0, Image.fromarray(IMAGE)
    c = [0.75, 0.5, 0.4, 0.3, 0.15][severity - 1]
    means = np.mean(x, axis=(0, 1), keepdims=True)
    assert np.array_equal(corrupted("contrast", severity), np.uint8(np.clip((x - means) * c + means, 0, 1) * 255))
    side = int(32 * [0.95, 0.9, 0.85, 0.75, 0.65][severity - 1])
    expected = image.resize((side, side), Image.BOX).resize((32, 32), Image.BOX)
    assert np.array_equal(corrupted("pixelate", severity), np.asarray(expected))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=[80, 65, 58, 50, 40][severity - 1])
    assert np.array_equal(corrupted("jpeg_compression", severity), np.asarray(Image.open(file)))
    added = [0.05, 0.1, 0.15, 0.2, 0.3][severity - 1]  # to the largest channel, as the value of a color is
    brighter = corrupted("brightness", severity).max(axis=-1) / 255
    assert np.abs(brighter - np.clip(x.max(axis=-1) + added, 0, 1)).max() < 1.01 / 255


def test_zoom_blur_is_a_mean_of_the_image_and_of_zooms_that_begin_with_it() -> None:
    flat = np.full((32, 32, 3), 77, np.uint8)
    assert np.abs(corrupted("zoom_blur", image=flat).astype(int) - 77).max() <= 1
    dot = np.zeros((32, 32, 3), np.uint8)
    dot[0, 0] = 255  # zooms lose the corner, but for the first of six at severity 1, which is the image itself
    blurred = corrupted("zoom_blur", 1, image=dot)
    assert blurred[0, 0, 0] >= 255 * 2 // 7


def test_another_size_is_refused_with_the_one_to_take() -> None:
    with pytest.raises(SurgicalError, match=r"28 x 28.*fog"):
        corruption("cifar10_c/fog", 5)(np.zeros((28, 28, 3), np.uint8), rng())
