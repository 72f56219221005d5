"""Write the five target draws of the Fashion-MNIST recipes.

Run from the root of the repository:

    python recipes/fashion_mnist/make_data.py

The source model sees train[:50000] only. Training and validation images of the draws come from
train[50000:60000], test images from the 10,000 test images, and no image is used twice. The test splits of all draws
together are all test images: 3,000 in each of the first three, 500 in each of the other two.
"""

import argparse
import gzip
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SOURCE_SIZE = 50_000  # train[:50000] belongs to the source model
TEST_ENDS = (0, 3_000, 6_000, 9_000, 9_500, 10_000)  # where the test images of each draw end
HERE = Path(__file__).parent
# WebP decodes as RGB; mode="L" is stored with the file and gives one channel again, pixel for pixel.
FEATURES = datasets.Features({"image": datasets.Image(mode="L"), "label": datasets.ClassLabel(names=NAMES)})


def read_fashion_mnist(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,) of "train" or "test", from the idx files in a folder or from the Hub."""
    if source == "hub":
        data = datasets.load_dataset("zalando-datasets/fashion_mnist", split=split)
        return np.stack([np.asarray(image) for image in data["image"]]), np.asarray(data["label"])
    stem = Path(source) / {"train": "train", "test": "t10k"}[split]
    images = gzip.decompress(Path(f"{stem}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress(Path(f"{stem}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def encode(image: np.ndarray) -> bytes:
    """Lossless WebP: an eighth smaller than an optimised PNG here."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def write(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Write one split, then check that it reads back with the same pixels and labels."""
    rows = {"image": [{"bytes": encode(image), "path": None} for image in images], "label": labels.tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(path)
    written = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    pixels = np.stack([np.asarray(image) for image in written["image"]])
    if not (np.array_equal(pixels, images) and np.array_equal(written["label"], labels)):
        raise ValueError(f"{path} does not read back as it was written")
    print(f"{path.relative_to(HERE)}: {len(labels)} images, {path.stat().st_size:,} bytes")


def main() -> None:
    """Write the fifteen files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source",
        default="/usr/share/datasets/fashion-mnist",
        help='folder with the four idx files (Debian package dataset-fashion-mnist), or "hub" (default: %(default)s)',
    )
    source = parser.parse_args().source
    train, test = (read_fashion_mnist(source, split) for split in ("train", "test"))
    rng = np.random.default_rng(0)
    # One permutation a pool, cut in pieces: that is what keeps the draws and splits apart.
    train_order = SOURCE_SIZE + rng.permutation(10_000)
    test_order = rng.permutation(10_000)
    for draw in range(len(TEST_ENDS) - 1):
        train_part, validation_part = np.split(train_order[1000 * draw : 1000 * (draw + 1)], 2)
        test_part = test_order[TEST_ENDS[draw] : TEST_ENDS[draw + 1]]
        parts = {"train": (train, train_part), "validation": (train, validation_part), "test": (test, test_part)}
        for split, ((images, labels), rows) in parts.items():
            write(images[rows], labels[rows], HERE / f"target-{draw}" / f"{split}.parquet")


if __name__ == "__main__":
    main()
