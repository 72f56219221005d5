"""Train the source model of the Fashion-MNIST recipes: a ViT of 206 k parameters on train[:50000].

Run from the root of the repository (about seven minutes on two CPU cores):

    python recipes/fashion_mnist/make_source.py

Writes the model, its image processor and a model card with the measured accuracies to recipes/fashion_mnist/vit/.
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


class Images(torch.utils.data.Dataset):
    """Prepared images with labels, each image mirrored half of the time where `flip` is set."""

    def __init__(self, pixel_values: torch.Tensor, labels: np.ndarray, flip: bool = False) -> None:
        self.pixel_values, self.labels, self.flip = pixel_values, torch.tensor(labels, dtype=torch.long), flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, mirrored = self.pixel_values[index], self.flip and torch.rand(()) < 0.5
        return {"pixel_values": image.flip(-1) if mirrored else image, "labels": self.labels[index]}


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist", help='as in make_data.py, or "hub"')
    parser.add_argument("--output", type=Path, default=HERE / "vit")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    size = {"height": 28, "width": 28}
    processor = ViTImageProcessorPil(do_resize=False, size=size, image_mean=[0.5], image_std=[0.5])

    def prepare(images: np.ndarray) -> torch.Tensor:
        batch = processor(list(images[..., None]), input_data_format="channels_last", return_tensors="pt")
        return batch["pixel_values"]

    (images, labels), (test_images, test_labels) = (read_fashion_mnist(args.source, s) for s in ("train", "test"))
    pixel_values = prepare(images)
    torch.manual_seed(args.seed)
    shape = {"image_size": 28, "num_channels": 1, "patch_size": 7, "hidden_size": 64, "intermediate_size": 128}
    labelling = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
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
        warmup_steps=SOURCE_SIZE // BATCH_SIZE,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,  # the card's numbers come from a CPU
    )
    train = Images(pixel_values[:SOURCE_SIZE], labels[:SOURCE_SIZE], flip=True)
    trainer = Trainer(model, training, train_dataset=train)
    trainer.train()

    def accuracy(pixel_values: torch.Tensor, labels: np.ndarray) -> float:
        return float((trainer.predict(Images(pixel_values, labels)).predictions.argmax(-1) == labels).mean())

    numbers = {"held_out": accuracy(pixel_values[SOURCE_SIZE:], labels[SOURCE_SIZE:])}
    numbers |= {"test": accuracy(prepare(test_images), test_labels), "parameters": model.num_parameters()}
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    facts = {**vars(args), "batch_size": BATCH_SIZE, "torch_version": torch.__version__}
    (args.output / "README.md").write_text(CARD.format(**numbers, **facts))
    print(numbers)


if __name__ == "__main__":
    main()
