"""Data that are faulty or ambiguous in one way each, and the words that have to be in what is said of them.

python -m tests.support.faulty_data     # prints the file that causes each message, and the message, as Markdown
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import BertForSequenceClassification

from surgical_peft import SurgicalError
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task

from .toy_tasks import TOY_TASKS, bert, write_model

LINES = [f"now {number},{1 + number % 5}" for number in range(50)]


def csv(folder: Path, header: str, lines: list[str], name: str = "reviews.csv") -> Path:
    """A CSV file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join([header, *lines]) + "\n")
    return folder / name


def stars(folder: Path) -> Path:
    """Reviews with 1 to 5 stars."""
    return csv(folder, "text,stars", LINES)


def two_splits(folder: Path) -> Path:
    """The same as `train.csv` and `test.csv`."""
    for name in ("train.csv", "test.csv"):
        csv(folder, "text,stars", LINES, name)
    return folder


def empty_cells(folder: Path) -> Path:
    """Stars are missing in three rows, a text in one."""
    lines = [line.split(",")[0] + "," if row in (12, 40, 47) else line for row, line in enumerate(LINES)]
    lines[20] = ",3"
    return csv(folder, "text,stars", lines)


def all_empty(folder: Path) -> Path:
    """No row has a text."""
    return csv(folder, "text,stars", [f",{line.split(',')[1]}" for line in LINES])


def huge_cell(folder: Path) -> Path:
    """A text of eleven million characters."""
    rows = [{"text": "now", "stars": 1}, {"text": "x" * 11_000_000, "stars": 2}]
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows * 5).to_parquet(folder / "reviews.parquet")
    return folder / "reviews.parquet"


def classes(*names: str, count: int = 20) -> Callable[[Path], Path]:
    """A maker of texts with these classes in turn."""

    def make(folder: Path) -> Path:
        return csv(folder, "text,label", [f"now {row},{names[row % len(names)]}" for row in range(count)])

    make.__doc__ = f"CSV with the classes {', '.join(names)}."
    return make


def ids(folder: Path) -> Path:
    """A CSV whose `label` is a number of a billion and more, another one in each row."""
    return csv(folder, "text,label", [f"now,{10**9 + row}" for row in range(100)])


def no_label(folder: Path) -> Path:
    """A CSV with texts alone."""
    return csv(folder, "text", ["now", "win"])


def unlabeled_test(folder: Path) -> Path:
    """A test split whose labels are all -1, as GLUE has it."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])})
    for split in ("train", "validation", "test"):
        rows = [{"text": "now", "label": -1 if split == "test" else row % 2} for row in range(10)]
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def pictures(folder: Path) -> Path:
    """Ten images each of two classes; in `b` one is cut off and one is text."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    whole = (folder / "b" / "3.png").read_bytes()
    (folder / "b" / "3.png").write_bytes(whole[:-900])
    (folder / "b" / "7.png").write_text("no image")
    return folder


def bomb(folder: Path) -> Path:
    """An image of 900 million pixels in a file of 109 kB."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(5):
            Image.new("L", (8, 8)).save(folder / name / f"{number}.png")
    Image.new("1", (30_000, 30_000)).save(folder / "a" / "0.png")
    return folder


def nested_test(folder: Path) -> Path:
    """A folder `test` inside `train`."""
    for part in ("train", "train/test"):
        for name in "ab":
            (folder / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / part / name / "0.png")
    return folder


def few(folder: Path) -> Path:
    """A CSV with two rows."""
    return csv(folder, "text,label", ["now,ham", "win,spam"])


def script(folder: Path) -> Path:
    """A folder `data` with `data.py`."""
    csv(folder / "data", "text,label", ["now,ham"])
    (folder / "data" / "data.py").write_text("raise RuntimeError('ran')")
    return folder / "data"


def stray_file(folder: Path) -> Path:
    """`train.csv` and `more.csv` in a folder."""
    csv(folder, "text,stars", LINES, "train.csv")
    return csv(folder, "text,stars", LINES, "more.csv").parent


@dataclass(frozen=True)
class Case:
    """Data, the recipe's keys, and words of what is said.

    Attributes:
        make: writes the data, and gives their path.
        words: a regular expression for the error or, with `is_read`, for a line of the summary.
        is_read: whether the data are read.
        keys: of the recipe.
        labels: of the model.
        is_image: whether the data are images.
    """

    make: Callable[[Path], Path]
    words: str
    is_read: bool = False
    keys: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ("ham", "spam")
    is_image: bool = False


NEW = {"new_head": True}
STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
CASES = {
    "one file": Case(stars, "no validation split: 20 % of train, seed 0, by class", True, NEW),
    "train and test": Case(two_splits, "no validation split: 20 % of train", True, NEW),
    "test as validation": Case(
        two_splits, "split validation: the data's test", True, {**NEW, "splits": {"validation": "test"}}
    ),
    "a split that there is not": Case(two_splits, "'dev'.*train, test", keys={"splits": {"validation": "dev"}}),
    "too few rows": Case(few, "2 training rows are too few"),
    "test inside train": Case(nested_test, "both in train and test.*train/test/a/0.png", is_image=True),
    "a file in no split": Case(stray_file, r"1 file is in no split, such as more\.csv"),
    "a loading script": Case(script, r"data\.py, a loading script"),
    "stars 1 to 5": Case(stars, "new head with 5 labels: 1, 2, 3, 4, 5", True, NEW),
    "stars, and a model with five labels": Case(
        stars, "labels fit by number only.*1, 2, 3, 4, 5.*1 star", True, labels=STARS
    ),
    "stars, and a model with two": Case(stars, r"0 to 1 \(ham, spam\).*1, 2, 3, 4, 5.*new_head: true"),
    "classes that the model knows": Case(classes("spam", "ham"), "labels matched by name: ham, spam", True),
    "in another case": Case(classes("Spam", "Ham"), "labels matched by name: Ham = ham, Spam = spam", True),
    "classes that it does not know": Case(
        classes("no", "yes"), "warning: labels fit by number only.*no, yes.*ham, spam.*new_head", True
    ),
    "one that it does not know": Case(
        classes("car", "lorry", "ship"), "2 by name, not lorry;.*new_head: true", labels=("car", "ship", "truck")
    ),
    "labels without a name in the model": Case(
        classes("no", "yes"), "labels matched by number: no = LABEL_0", True, labels=("LABEL_0", "LABEL_1")
    ),
    "more classes than labels": Case(classes("no", "yes", "perhaps"), r"0 to 1 \(ham, spam\).*new_head: true"),
    "one class": Case(classes("ham"), "one class only, 'ham'"),
    "no label column": Case(no_label, "none of its columns can be the label"),
    "an id as label": Case(ids, "100 different values in 100 rows", keys=NEW),
    "labels of -1": Case(unlabeled_test, r"split test: column label has cells without a label \(-1\) in all 10 rows"),
    "and no test split": Case(unlabeled_test, "no test split", True, {"splits": {"test": None}}),
    "empty cells": Case(
        empty_cells,
        r"column text has 1 empty cell, row 20(.|\n)*3 empty cells, rows 12, 40, 47.*(.|\n)*drop_empty: true",
    ),
    "empty cells left out": Case(
        empty_cells, "left out by drop_empty: .*stars has 3 empty cells, rows 12", True, {**NEW, "drop_empty": True}
    ),
    "all cells empty": Case(all_empty, "column text has empty cells in all 50 rows", keys=NEW),
    "a huge cell": Case(huge_cell, "5 texts of more than 10,000,000 characters, rows 1, 3", keys=NEW),
    "images that cannot be read": Case(
        pictures, r"2 images that cannot be read, rows 13, 17 of 20: .*b/3\.png .*b/7\.png", is_image=True
    ),
    "such images left out": Case(
        pictures, "left out by drop_empty: .*2 images", True, {**NEW, "drop_empty": True}, is_image=True
    ),
    "a decompression bomb": Case(bomb, r"1 image that cannot be read, row 0 of 10: .*a/0\.png .*bomb", is_image=True),
}


def said_of(case: Case, folder: Path, images: Recipe, texts: Recipe) -> tuple[bool, str]:
    """Whether a case's data are read, and the lines of the summary or the error."""
    data = case.make(folder / "made")
    recipe = images
    if not case.is_image:
        model = bert(BertForSequenceClassification, len(case.labels), id2label=dict(enumerate(case.labels)))
        recipe = replace(texts, model=str(write_model(folder / "model", model)))
    try:
        task = load_task(replace(recipe, data=str(data), **case.keys))
    except SurgicalError as error:
        return False, str(error)
    return True, "\n".join(task.summary)


def toys(folder: Path) -> tuple[Recipe, Recipe]:
    """Recipes of images and of texts that cases are made of."""
    images, texts = (TOY_TASKS[f"{kind}_classification"](folder / kind) for kind in ("image", "text"))
    return replace(images, corruption=None), replace(texts, character_noise=None)


def main() -> None:
    """Print all cases."""
    with tempfile.TemporaryDirectory() as temporary:
        recipes = toys(Path(temporary))
        print("| case | data | keys | says |\n| --- | --- | --- | --- |")
        for number, (name, case) in enumerate(CASES.items()):
            _, text = said_of(case, Path(temporary) / str(number), *recipes)
            shown = text.replace(temporary + f"/{number}/", "").replace("\n", "<br>").replace("|", "\\|")
            print(f"| {name} | {case.make.__doc__} | {json.dumps(case.keys) if case.keys else ''} | {shown} |")


if __name__ == "__main__":
    main()
