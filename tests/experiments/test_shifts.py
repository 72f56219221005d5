from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator
from PIL import Image

from surgical_peft import SurgicalError
from surgical_peft.experiments.shifts import (
    CORRUPTIONS,
    casing,
    character_noise,
    contrast,
    corruption,
    gaussian_noise,
    keep_share,
    read_label_map,
)
from surgical_peft.experiments.shifts.classes import class_number

OURS = ("gaussian_noise", "contrast")
THEIRS = tuple(name for name in CORRUPTIONS if name not in OURS and "/" not in name)


def rng(seed: int = 0) -> Generator:
    return np.random.default_rng(seed)


def imagenet_c_gaussian_noise(image: np.ndarray, severity: int, noise: np.ndarray) -> np.ndarray:
    """The formula of ImageNet-C's code, with the unit noise handed in."""
    c = [0.08, 0.12, 0.18, 0.26, 0.38][severity - 1]
    return np.clip(image / 255.0 + c * noise, 0, 1) * 255


def imagenet_c_contrast(image: np.ndarray, severity: int) -> np.ndarray:
    """The formula of ImageNet-C's code."""
    c = [0.4, 0.3, 0.2, 0.1, 0.05][severity - 1]
    x = np.array(image) / 255.0
    means = np.mean(x, axis=(0, 1), keepdims=True)
    return np.clip((x - means) * c + means, 0, 1) * 255


@pytest.mark.parametrize("severity", range(1, 6))
def test_gaussian_noise_is_that_of_imagenet_c(severity: int) -> None:
    image = rng().integers(0, 256, (28, 28), dtype=np.uint8)
    noisy = gaussian_noise(image, severity, rng(7))
    expected = imagenet_c_gaussian_noise(image, severity, rng(7).normal(size=image.shape))
    assert noisy.dtype == np.uint8
    assert np.abs(noisy - expected).max() < 1  # the cast to uint8 cuts the fraction off


@pytest.mark.parametrize("shape", [(28, 28), (8, 9, 3)])
@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_is_that_of_imagenet_c(severity: int, shape: tuple[int, ...]) -> None:
    image = rng().integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(contrast(image, severity, rng()), np.uint8(imagenet_c_contrast(image, severity)))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_corruption_is_deterministic_and_leaves_the_image_alone(name: str, shape: tuple[int, ...]) -> None:
    image = rng().integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    corrupt = corruption(name, 5)
    first, second = (corrupt(image, rng(3)) for _ in range(2))
    assert np.array_equal(first, second) and first.shape == shape and not np.array_equal(first, image)
    assert np.array_equal(image, before)


def test_noise_is_that_of_its_generator() -> None:
    image = np.full((8, 8), 128, dtype=np.uint8)
    assert not np.array_equal(gaussian_noise(image, 5, rng(1)), gaussian_noise(image, 5, rng(2)))


def test_all_of_imagenet_c_are_there() -> None:
    assert {"snow", "jpeg_compression", "speckle_noise", "saturate"} < {*CORRUPTIONS}


def test_unknown_corruption_suggests_the_nearest() -> None:
    with pytest.raises(SurgicalError, match="'gaussian_noise'"):
        corruption("gausian_noise", 5)


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_severity_out_of_range(severity: int) -> None:
    with pytest.raises(SurgicalError, match=f"severity={severity}"):
        corruption("gaussian_noise", severity)


def test_without_the_library_its_corruptions_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    assert corruption("contrast", 1)
    for name in (*THEIRS, "cifar10_c/contrast"):
        with pytest.raises(SurgicalError, match=r"'surgical-peft\[shifts\]'.*gaussian_noise"):
            corruption(name, 1)


def test_the_library_gets_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions draw from NumPy's global generator, or from a seed; they take color images only."""
    seen: list[Any] = []

    def shift(image: Image.Image, severity: int, **kwargs: Any) -> np.ndarray:
        seen.append((image.mode, severity, kwargs.get("seed"), np.random.random()))
        return np.stack([np.full((4, 5), channel) for channel in (10.9, 20, 30)], axis=-1)

    library = SimpleNamespace(corruption_dict=dict.fromkeys(THEIRS, shift))
    monkeypatch.setitem(sys.modules, "imagecorruptions", library)
    np.random.seed(5)
    state = np.random.get_state()[1].tolist()
    image = np.zeros((4, 5), dtype=np.uint8)
    for name in ("fog", "fog", "glass_blur"):
        gray = corruption(name, 2)(image, rng(1))
        assert gray.shape == (4, 5) and gray.dtype == np.uint8 and (gray == 10).all()
    assert corruption("fog", 2)(np.zeros((4, 5, 3), dtype=np.uint8), rng(1)).shape == (4, 5, 3)
    assert np.random.get_state()[1].tolist() == state
    assert [mode for mode, *_ in seen] == ["RGB"] * 4 and {severity for _, severity, *_ in seen} == {2}
    assert len({drawn for *_, drawn in seen}) == 1  # the same generator gives the same image
    assert [seed is None for _, _, seed, _ in seen] == [True, True, False, True]


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("name", THEIRS)
def test_the_librarys_corruptions_are_deterministic(name: str, size: int) -> None:
    ramp = np.add.outer(np.arange(size), 2 * np.arange(size)) * 255 // (3 * size)
    gray = ramp.astype(np.uint8)
    for image in (gray, np.stack([gray, gray[::-1], 255 - gray], axis=-1)):
        for severity in (1, 5):
            corrupt = corruption(name, severity)
            first = corrupt(image, rng(3))
            np.random.seed(0)
            assert np.array_equal(first, corrupt(image, rng(3)))
            assert first.shape == image.shape and first.dtype == np.uint8
    assert not np.array_equal(first, image)


def test_character_noise_makes_three_kinds_of_errors_at_the_rate() -> None:
    text = "the quick brown fox " * 500
    replaced = character_noise(text, 30, rng())
    lengths = len(text) - 1000, len(text) + 1000
    assert lengths[0] < len(replaced) < lengths[1]  # as many are doubled as left out
    # Against a plain walk over the same draws.
    again = rng()
    kinds = again.choice(4, size=len(text), p=[0.7, 0.3 / 3, 0.3 / 3, 0.3 / 3])
    letters = again.choice(list("abcdefghijklmnopqrstuvwxyz"), size=len(text))
    expected = ""
    for kind, old, new in zip(kinds, text, letters, strict=True):
        expected += [old, new, "", old + old][kind]
    assert replaced == expected
    assert (kinds != 0).mean() == pytest.approx(0.3, abs=0.015)


def test_casing_swaps_the_case_at_the_rate() -> None:
    text = "Aa" * 5000
    swapped = sum(a != b for a, b in zip(casing(text, 25, rng()), text, strict=True))
    assert swapped / len(text) == pytest.approx(0.25, abs=0.015)
    assert casing("Free money", 100, rng()) == "fREE MONEY"
    assert casing("straße", 100, rng()) == "STRASSE"


def test_text_without_characters_stays() -> None:
    assert character_noise("", 50, rng()) == "" == casing("", 50, rng())


def test_label_maps() -> None:
    classes = ["boot", "coat", "dress", "shirt"]
    assert read_label_map(None, classes) == [0, 1, 2, 3]
    assert read_label_map([1, 0, None, 1], classes) == [1, 0, None, 1]
    assert read_label_map({"shirt": 0, 1: 0, "boot": 1}, classes) == [1, 0, None, 0]


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ([0, 1], "4 entries.*boot, coat, dress, shirt"),
        ([0, 1, 2, -1], "-1 "),
        ([0, 1, 2, True], "True "),
        ({"shoe": 0}, "label_map.*'shoe'"),
        ({"shirts": 0}, "'shirt'"),
        ({4: 0}, "4.*boot, coat, dress, shirt.*0 to 3"),
        ({"boot": "first"}, "'first'"),
        ("reversed", "a list nor a mapping"),
    ],
)
def test_a_wrong_label_map(label_map: Any, message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        read_label_map(label_map, ["boot", "coat", "dress", "shirt"])


def test_a_share_of_a_class_is_kept() -> None:
    labels = [0] * 100 + [1] * 40 + [2] * 3
    kept = keep_share(labels, {1: 0.25, 2: 0.01}, seed=0)
    counts = np.bincount([labels[place] for place in kept])
    assert counts.tolist() == [100, 10, 1]  # at least one
    assert kept == sorted(kept) == keep_share(labels, {2: 0.01, 1: 0.25}, seed=0)
    assert kept != keep_share(labels, {1: 0.25, 2: 0.01}, seed=1)
    assert set(keep_share(labels, {1: 0.1}, seed=0)) != set(keep_share(labels, {1: 0.2}, seed=0))


def test_classes_by_name_and_number() -> None:
    assert class_number("imbalance", "b", ["a", "b"]) == 1 == class_number("imbalance", 1, ["a", "b"])
    assert class_number("label_map", 2, ["1", "2", "3"]) == 1 == class_number("label_map", "2", ["1", "2", "3"])
    with pytest.raises(SurgicalError, match="no class 0"):  # of stars from 1 to 3 there is none with 0
        class_number("label_map", 0, ["1", "2", "3"])
    with pytest.raises(SurgicalError, match=r"imbalance.*True"):
        class_number("imbalance", True, ["a", "b"])
