"""Train the source model of the Fashion-MNIST recipes: a ViT of 206 k parameters on train[:50000].

Run from the root of the repository (about seven minutes on two CPU cores):

    python recipes/fashion_mnist/make_source.py

Writes the model, its image processor and a model card with the measured accuracies to recipes/fashion_mnist/vit/.
With --superclass it trains the source model of the subclass shift instead, to recipes/fashion_mnist/vit-superclass/:
three super-classes, learnt from five of the ten classes (about two minutes on one core).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from make_data import HERE, NAMES, SOURCE_SIZE, read_fashion_mnist
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

BATCH_SIZE = 128
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
datasets:
- zalando-datasets/fashion_mnist
---

# A small Fashion-MNIST ViT

The source model of the recipes of `surgical_peft`: a vision transformer of {parameters:,} parameters (28x28 grayscale
input, patch 7, width 64, 6 layers, 4 heads), small enough to travel with the repository and to adapt on a CPU.

| Images | Accuracy |
|---|---|
| train[50000:60000], held out | {held_out:.2%} |
| test (t10k) | {test:.2%} |

It was trained from random weights, on train[:50000] of Fashion-MNIST only (MIT, (c) 2017 Zalando SE), by

    python recipes/fashion_mnist/make_source.py --epochs {epochs} --seed {seed}

with `torch` {torch_version}: AdamW, batch {batch_size}, one epoch of warm-up to 2e-3, then cosine decay, horizontal
flips. Nothing was tuned on the images in the table. Other versions or thread counts may give other weights.

`AutoImageProcessor.from_pretrained(folder, backend="pil")` prepares the images, without `torchvision`: PIL images of
mode "L", or (28, 28, 1) arrays with `input_data_format="channels_last"`. It refuses 2-D arrays and RGB images, and
does not resize.

Limits: it knows ten kinds of clothing on a black background at 28x28 and nothing else, has seen no corrupted image,
and is no strong baseline for Fashion-MNIST.
"""

# Each super-class is learnt from some of its kinds of clothing, to be adapted to its others: tops to coat and shirt,
# shoes to ankle boot, the rest to dress.
SUPERCLASSES = {"tops": [0, 2], "shoes": [5, 7], "rest of the body": [1]}
SUPERCLASS_EPOCHS = 6
SUPERCLASS_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
datasets:
- zalando-datasets/fashion_mnist
---

# A small Fashion-MNIST ViT for three super-classes

The source model of the subclass shift of `surgical_peft`: the architecture of `../vit`, {parameters:,} parameters,
with three labels. It has learnt tops from T-shirts and pullovers, shoes from sandals and sneakers, and the rest of the
body from trousers. Coats and shirts (tops), ankle boots (shoes) and dresses (rest of the body) it has never seen: they
are the target of the shift.

| Images of the five source classes | Accuracy |
|---|---|
| train[50000:60000], held out | {held_out:.2%} |
| test (t10k) | {test:.2%} |

It was trained from random weights, on the {images:,} images of the source classes in train[:50000] of Fashion-MNIST
(MIT, (c) 2017 Zalando SE), by

    python recipes/fashion_mnist/make_source.py --superclass --epochs {epochs} --seed {seed}

with `torch` {torch_version}: AdamW, batch {batch_size}, one epoch of warm-up to 2e-3, then cosine decay, horizontal
flips. Nothing was tuned on the images in the table. Other versions or thread counts may give other weights.

The images are prepared as for `../vit`, whose limits hold here too.
"""


class Images(torch.utils.data.Dataset):
    """Prepared images with labels, each image mirrored half of the time where `flip` is set."""

    def __init__(self, pixel_values: torch.Tensor, labels: np.ndarray, flip: bool = False) -> None:
        self.pixel_values, self.labels, self.flip = pixel_values, torch.tensor(labels, dtype=torch.long), flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, mirrored = self.pixel_values[index], self.flip and torch.rand(()) < 0.5
        return {"pixel_values": image.flip(-1) if mirrored else image, "labels": self.labels[index]}


def superclasses(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images of the source classes alone, with the super-class of each."""
    of_class = {old: new for new, classes in enumerate(SUPERCLASSES.values()) for old in classes}
    kept = np.isin(labels, list(of_class))
    return images[kept], np.array([of_class[label] for label in labels[kept]])


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist", help='as in make_data.py, or "hub"')
    parser.add_argument("--superclass", action="store_true", help="the model of the subclass shift")
    parser.add_argument("--output", type=Path, help="default: vit or vit-superclass, beside this file")
    parser.add_argument("--epochs", type=int, help=f"default: 12, or {SUPERCLASS_EPOCHS} with --superclass")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output = args.output or HERE / ("vit-superclass" if args.superclass else "vit")
    args.epochs = args.epochs or (SUPERCLASS_EPOCHS if args.superclass else 12)

    size = {"height": 28, "width": 28}
    processor = ViTImageProcessorPil(do_resize=False, size=size, image_mean=[0.5], image_std=[0.5])

    def prepare(images: np.ndarray) -> torch.Tensor:
        batch = processor(list(images[..., None]), input_data_format="channels_last", return_tensors="pt")
        return batch["pixel_values"]

    (images, labels), test = (read_fashion_mnist(args.source, s) for s in ("train", "test"))
    parts = {
        "train": (images[:SOURCE_SIZE], labels[:SOURCE_SIZE]),
        "held_out": (images[SOURCE_SIZE:], labels[SOURCE_SIZE:]),
        "test": test,
    }
    names = NAMES
    if args.superclass:
        names = list(SUPERCLASSES)
        parts = {part: superclasses(*data) for part, data in parts.items()}
    torch.manual_seed(args.seed)
    shape = {"image_size": 28, "num_channels": 1, "patch_size": 7, "hidden_size": 64, "intermediate_size": 128}
    labelling = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = ViTForImageClassification(ViTConfig(**shape, num_hidden_layers=6, num_attention_heads=4, **labelling))
    training = TrainingArguments(
        output_dir=str(args.output),
        seed=args.seed,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=500,
        learning_rate=2e-3,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=len(parts["train"][0]) // BATCH_SIZE,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,  # the card's numbers come from a CPU
    )
    images, labels = parts["train"]
    trainer = Trainer(model, training, train_dataset=Images(prepare(images), labels, flip=True))
    trainer.train()

    def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
        return float((trainer.predict(Images(prepare(images), labels)).predictions.argmax(-1) == labels).mean())

    numbers = {part: accuracy(*parts[part]) for part in ("held_out", "test")}
    numbers |= {"parameters": model.num_parameters(), "images": len(labels)}
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    facts = {**vars(args), "batch_size": BATCH_SIZE, "torch_version": torch.__version__}
    card = SUPERCLASS_CARD if args.superclass else CARD
    (args.output / "README.md").write_text(card.format(**numbers, **facts))
    print(numbers)


if __name__ == "__main__":
    main()
