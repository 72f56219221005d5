"""Write target sets of CIFAR-10 and CIFAR-10-C for the recipes of this folder, as the paper draws them.

Run from the root of the repository (25 minutes on one CPU core, most of it for two blurs; what is there is kept):

    python recipes/real/make_cifar10.py CIFAR OUTPUT

CIFAR is a folder with CIFAR-10 as `train.parquet` and `test.parquet`, or `uoft-cs/cifar10` with a network. OUTPUT then
holds, with the splits train, validation and test, all by class in equal parts: in each draw 1,000, 500 and 3,000 of
the 10,000 test images,

- `cifar10/source`: 49,000 training images, the other 1,000 to validate, 3,000 test images;
- `cifar10/0`, `1`, `2`: three draws;
- `cifar10-c/frost-0`, `frost-1` and so on: the same draws, under each of the 14 corruptions of the command in the
  README of the paper's code, at severity 5.

A source model that was trained on the 50,000 training images has seen none of them. The corrupted images are PNG: the
noise of a compression is not added to theirs.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from surgical_peft.atomic_files import whole_folder
from surgical_peft.experiments.shifts import corruption

CORRUPTIONS = (
    *("frost", "gaussian_blur", "gaussian_noise", "glass_blur", "impulse_noise", "jpeg_compression", "motion_blur"),
    *("pixelate", "saturate", "shot_noise", "snow", "spatter", "speckle_noise", "zoom_blur"),
)
SEVERITY = 5
PER_CLASS = {"train": 100, "validation": 50, "test": 300}
OF_SOURCE = {"train": 4900, "validation": 100}
OF_SOURCE_TEST = {"test": 300}
SEEDS = (0, 1, 2)


def draw(labels: np.ndarray, per_class: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Rows of each split: as many of each class, in an order of their own."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    ends = np.cumsum([0, *per_class.values()])
    parts = zip(per_class, ends[:-1], ends[1:], strict=True)
    return {
        split: rng.permutation(np.concatenate([order[start:end] for order in orders])) for split, start, end in parts
    }


def write_source(train: datasets.Dataset, test: datasets.Dataset, folder: Path) -> None:
    """What a source model of real size is tuned on."""
    if folder.is_dir():
        return
    with whole_folder(folder, "train.parquet") as temporary:
        for rows, per_class in ((train, OF_SOURCE), (test, OF_SOURCE_TEST)):
            for split, places in draw(np.asarray(rows["label"]), per_class, 0).items():
                rows.select(places).to_parquet(temporary / f"{split}.parquet")
    print(folder, flush=True)


def write(rows: datasets.Dataset, parts: dict[str, np.ndarray], folder: Path, name: str | None) -> None:
    """One target set, its images under the corruption `name` if there is one."""
    if folder.is_dir():
        return
    corrupt = corruption(f"cifar10_c/{name}", SEVERITY) if name else None

    def change(row: dict, place: int) -> dict:
        rng = np.random.default_rng((zlib.crc32(str(name).encode()), place))
        return {"image": Image.fromarray(corrupt(np.asarray(row["image"].convert("RGB")), rng))}

    with whole_folder(folder, "train.parquet") as temporary:
        for split, places in parts.items():
            found = rows.select(places)
            if corrupt:
                changed = [change(row, int(place)) for row, place in zip(found, places, strict=True)]
                found = datasets.Dataset.from_dict(
                    {"image": [each["image"] for each in changed], "label": found["label"]}, features=rows.features
                )
            found.to_parquet(temporary / f"{split}.parquet")
    print(folder, flush=True)


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    train, test = (open_split(given.cifar, split) for split in ("train", "test"))
    write_source(train, test, given.output / "cifar10" / "source")
    for seed in given.seeds:
        parts = draw(np.asarray(test["label"]), PER_CLASS, seed)
        write(test, parts, given.output / "cifar10" / str(seed), None)
        for name in CORRUPTIONS:
            write(test, parts, given.output / "cifar10-c" / f"{name}-{seed}", name)


def open_split(source: str, split: str) -> datasets.Dataset:
    """A split of CIFAR-10, its images in the column `image`; on the Hub it is called `img`."""
    try:
        rows = datasets.load_dataset(source, split=split)
    except OSError as error:  # not found, or no network; what is found and damaged tells itself
        raise SystemExit(
            f"{source!r} is neither a folder with train.parquet and test.parquet nor to be had from the Hub now. Give "
            "the folder, make real-data CIFAR=FOLDER, or with a network make real-data CIFAR=uoft-cs/cifar10 "
            f"HF_HUB_OFFLINE=0. ({type(error).__name__})"
        ) from None
    return rows.rename_column("img", "image") if "img" in rows.column_names else rows


if __name__ == "__main__":
    main()
