"""The shifts that criteria are judged on: what each is, and its model and data for one seed.

    task = load("noise", seed=0)
    accuracy(task.model(), task.test)

Criteria are developed on the shifts of the group "design" alone; those of "confirmation" are for one look at the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import images
import mails
import torch
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.utils import logging

WORK = Path(__file__).parent / "work"
SEEDS = (0, 1, 2)
SPLITS = ("train", "validation", "test")
Split = dict[str, torch.Tensor]  # what the model takes, by name, and `labels`; the first axis counts the examples

logging.disable_progress_bar()  # one bar for each of hundreds of models


@dataclass(frozen=True)
class Shift:
    """Where a shift belongs.

    Attributes:
        group: "design" or "confirmation".
        kind: "image" or "mail".
    """

    group: str
    kind: str


SHIFTS = {
    "noise": Shift("design", "image"),
    "label map": Shift("design", "image"),
    "subclass": Shift("design", "image"),
    "contrast": Shift("design", "image"),
    "cyclic labels": Shift("design", "image"),
    "hard mail": Shift("design", "mail"),
    "spam label flip": Shift("design", "mail"),
    # These were for confirmation once. `inverted` showed that the first probe needed more thrift, `noise and label
    # map` that it misses the head where inputs and labels change at once; its second form was developed on all.
    "inverted": Shift("design", "image"),
    "blur": Shift("design", "image"),
    "noise and label map": Shift("design", "image"),
    "typing noise": Shift("design", "mail"),
    "no vowels": Shift("design", "mail"),
    # So were these, until the second form of the probe lost 3.7 points on those where two things change at once.
    "rotated": Shift("design", "image"),
    "pixelated": Shift("design", "image"),
    "occluded": Shift("design", "image"),
    "swapped labels": Shift("design", "image"),
    "contrast and cyclic labels": Shift("design", "image"),
    "noise and subclass": Shift("design", "image"),
    "shuffled words": Shift("design", "mail"),
    "typing noise and label flip": Shift("design", "mail"),
    # And these, on which two passes through the training batches turned out to be too few: last layers learn fast.
    "upside down": Shift("design", "image"),
    "spoilt pixels": Shift("design", "image"),
    "moved": Shift("design", "image"),
    "cyclic tops": Shift("design", "image"),
    "inverted and cyclic labels": Shift("design", "image"),
    "blur and swapped labels": Shift("design", "image"),
    "rotated and noise": Shift("design", "image"),
    "occluded and subclass": Shift("design", "image"),
    "every second word": Shift("design", "mail"),
    "shuffled words and label flip": Shift("design", "mail"),
    # And these ten: on the six where two things changed the third form lost 3.2 points, for it did not train the
    # blocks that were best, and the noise of one held-out half decided.
    "edges": Shift("design", "image"),
    "striped": Shift("design", "image"),
    "sandals and sneakers": Shift("design", "image"),
    "bright and label map": Shift("design", "image"),
    "pixelated and cyclic labels": Shift("design", "image"),
    "upside down and swapped labels": Shift("design", "image"),
    "moved and inverted": Shift("design", "image"),
    "spoilt pixels and subclass": Shift("design", "image"),
    "first ten words": Shift("design", "mail"),
    "no vowels and label flip": Shift("design", "mail"),
    "zoomed out": Shift("confirmation", "image"),
    "posterised": Shift("confirmation", "image"),
    "cyclic shoes": Shift("confirmation", "image"),
    "posterised and cyclic labels": Shift("confirmation", "image"),
    "zoomed out and swapped labels": Shift("confirmation", "image"),
    "sheared and label map": Shift("confirmation", "image"),
    "dark and cyclic tops": Shift("confirmation", "image"),
    "mirrored and subclass": Shift("confirmation", "image"),
    "last ten words": Shift("confirmation", "mail"),
    "every second word and label flip": Shift("confirmation", "mail"),
}


@dataclass(frozen=True)
class Task:
    """The source model and the data of one shift and seed.

    Attributes:
        kind: of the shift.
        source: folder of the source model.
        train: what to tune on.
        validation: what to choose by.
        test: what to report.
    """

    kind: str
    source: Path
    train: Split
    validation: Split
    test: Split

    def model(self) -> nn.Module:
        """The source model, freshly loaded, in eval mode."""
        auto = AutoModelForImageClassification if self.kind == "image" else AutoModelForSequenceClassification
        return auto.from_pretrained(self.source)


def load(shift: str, seed: int, work: Path = WORK) -> Task:
    """The task of a shift and a seed (0 to 2); its tensors are made once and then kept in `work`."""
    kind = SHIFTS[shift].kind
    source = images.source(shift) if kind == "image" else mails.source(work)
    path = work / "tensors" / f"{shift.replace(' ', '-')}-{seed}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        splits = images.splits(shift, seed) if kind == "image" else mails.splits(shift, seed, work)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(splits, temporary)
        temporary.replace(path)  # in one piece: truth and criteria may be run side by side
    return Task(kind, source, **torch.load(path))


def loader(split: Split, batch_size: int, seed: int) -> list[Split]:
    """The training split in shuffled batches."""
    order = torch.randperm(len(split["labels"]), generator=torch.Generator().manual_seed(seed))
    return [{name: values[rows] for name, values in split.items()} for rows in order.split(batch_size)]


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split, batch_size: int = 100) -> float:
    """Share of the examples, 0 to 1, that the model classifies rightly; the model keeps its mode."""
    training = model.training
    model.eval()
    hits = 0
    for rows in torch.arange(len(split["labels"])).split(batch_size):
        batch = {name: values[rows] for name, values in split.items()}
        labels = batch.pop("labels")
        hits += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train(training)
    return hits / len(split["labels"])
