from __future__ import annotations

import numpy as np
import pytest

from surgical_peft import SurgicalError
from surgical_peft.shifts import CORRUPTIONS, corruption, gaussian_noise


def imagenet_c_gaussian_noise(image: np.ndarray, severity: int, noise: np.ndarray) -> np.ndarray:
    """The formula of ImageNet-C's code, with the unit noise handed in."""
    c = [0.08, 0.12, 0.18, 0.26, 0.38][severity - 1]
    return np.clip(image / 255.0 + c * noise, 0, 1) * 255


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_noise_is_that_of_imagenet_c(severity: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    noisy = gaussian_noise(image, severity, np.random.default_rng(7))
    expected = imagenet_c_gaussian_noise(image, severity, np.random.default_rng(7).normal(size=image.shape))
    assert noisy.dtype == np.uint8
    assert np.abs(noisy - expected).max() < 1  # the cast to uint8 cuts the fraction off


def test_noise_is_deterministic_and_leaves_the_image_alone() -> None:
    image = np.full((8, 8), 128, dtype=np.uint8)
    corrupt = corruption("gaussian_noise", 5)
    first, second = (corrupt(image, np.random.default_rng((1, 2))) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, corrupt(image, np.random.default_rng((1, 3))))
    assert (image == 128).all()


def test_unknown_corruption_suggests_the_nearest() -> None:
    with pytest.raises(SurgicalError, match="did you mean 'gaussian_noise'"):
        corruption("gausian_noise", 5)


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_severity_out_of_range(severity: int) -> None:
    assert CORRUPTIONS
    with pytest.raises(SurgicalError, match=f"severity={severity} is out of range"):
        corruption("gaussian_noise", severity)
