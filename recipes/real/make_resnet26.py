"""Train the source model of the paper's setting: a ResNet-26 of CIFAR form, on the 50,000 images of CIFAR-10.

Run from the root of the repository (an hour on one CPU core; killed, the same command goes on from the last epoch):

    python recipes/real/make_resnet26.py CIFAR OUTPUT

What is shipped as `recipes/real/resnet26` is what it made.

CIFAR is a folder with CIFAR-10 as `train.parquet` and `test.parquet`, or `uoft-cs/cifar10` with a network. OUTPUT then
holds the model, its image processor and a model card with its accuracy on the test images; what is there is kept. A
model below 85 % is not the source that the results are about: the command stops, and saves none.

Ours gets 86.4 %, and an earlier one, made on another machine, 86.0: from images that had been encoded as JPEG again,
which is harder than the original ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_cifar10 import open_split
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, ViTImageProcessorPil
from transformers.trainer_utils import get_last_checkpoint

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, by channel
SIZE = 128  # pixels: the stem of ResNetForImageClassification halves twice, which leaves the 32 x 32 of a CIFAR ResNet
EPOCHS, BATCH_SIZE, PROMISED = 20, 128, 0.85
CARD = """---
library_name: transformers
pipeline_tag: image-classification
datasets:
- uoft-cs/cifar10
---

# ResNet-26 of CIFAR form

Source model of the recipes in `recipes/real`: {parameters:,} parameters, basic blocks, three stages of four with 16,
32 and 64 channels. Images are enlarged from 32 to {size} pixels, so that the first stage sees 32 x 32.

Accuracy on the 10,000 test images of CIFAR-10: {accuracy:.2%}.

Trained from random weights on the 50,000 training images by `python recipes/real/make_resnet26.py` (seed {seed}, torch
{torch_version}): {epochs} epochs, batches of {batch_size}, SGD with Nesterov momentum 0.9, weight decay 5e-4, rate 0.1
after one epoch of warm-up and then along a cosine to 0, bfloat16 autocast, crops after padding by 4 pixels, flips.
"""


class Images(torch.utils.data.Dataset):
    """CIFAR-10 as the model takes it; with `augment` each image is flipped and moved by up to 4 pixels at random."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, augment: bool = False) -> None:
        self.images, self.labels, self.augment = torch.from_numpy(images), labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if self.augment:
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
            down, right = torch.randint(9, (2,)).tolist()
            image = torch.nn.functional.pad(image, (4, 4, 4, 4))[:, down : down + 32, right : right + 32]
        return {"pixel_values": image, "labels": self.labels[index]}


def prepare(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of bytes as the numbers that the image processor makes of the same images."""
    pixels = torch.stack([row["pixel_values"] for row in rows]).float()
    larger = torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear").round() / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    return {"pixel_values": (larger - mean) / std, "labels": torch.tensor([int(row["labels"]) for row in rows])}


def read_cifar10(source: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (count, 3, 32, 32) in bytes and labels, by split."""
    found = {split: open_split(source, split) for split in ("train", "test")}
    return {
        split: (
            np.stack([np.asarray(picture.convert("RGB")) for picture in rows["image"]]).transpose(0, 3, 1, 2),
            np.asarray(rows["label"]),
        )
        for split, rows in found.items()
    }


def resnet26() -> ResNetForImageClassification:
    """The architecture, with random weights."""
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: label for label, name in enumerate(NAMES)}}
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[4, 4, 4], layer_type="basic", **labels)
    )


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if (given.output / "measured.json").exists():
        return
    splits, work = read_cifar10(given.cifar), given.output.with_name(f"{given.output.name}.work")
    args = TrainingArguments(
        output_dir=str(work),
        seed=given.seed,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=500,
        optim="sgd",
        optim_args="momentum=0.9,nesterov=true",
        learning_rate=0.1,
        weight_decay=5e-4,
        max_grad_norm=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=len(splits["train"][1]) // BATCH_SIZE,
        bf16=True,
        use_cpu=True,
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=100,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to="none",
    )
    torch.manual_seed(given.seed)
    train = Images(*splits["train"], augment=True)
    trainer = Trainer(resnet26(), args, data_collator=prepare, train_dataset=train)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    predicted = trainer.predict(Images(*splits["test"])).predictions
    logits = predicted[0] if isinstance(predicted, tuple) else predicted
    accuracy = float((logits.argmax(-1) == splits["test"][1]).mean())
    if accuracy < PROMISED:
        raise SystemExit(
            f"the model gets {accuracy:.2%} of the test images right, and its results need {PROMISED:.0%}: nothing is "
            f"saved. Delete {work} and try another --seed; it was trained with torch {torch.__version__}."
        )
    trainer.model.save_pretrained(given.output)
    processor = ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=2, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(given.output)
    facts = {"size": SIZE, "epochs": EPOCHS, "batch_size": BATCH_SIZE, "seed": given.seed, "accuracy": accuracy}
    facts |= {"parameters": trainer.model.num_parameters(), "torch_version": torch.__version__}
    (given.output / "README.md").write_text(CARD.format(**facts))
    (given.output / "measured.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{given.output}: {accuracy:.2%} of the test images")


if __name__ == "__main__":
    main()
