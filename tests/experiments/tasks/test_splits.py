"""Data as people have them: one file, one folder, two splits, other names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

from surgical_peft import SurgicalError
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task, measured_split
from surgical_peft.experiments.tasks.splits import held_out
from tests.support.toy_tasks import TOY_TASKS

ROWS = [{"text": f"now {number}", "label": "spam" if number % 4 == 0 else "ham"} for number in range(40)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return replace(TOY_TASKS["text_classification"](tmp_path_factory.mktemp("texts")), character_noise=None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return replace(TOY_TASKS["image_classification"](tmp_path_factory.mktemp("images")), corruption=None)


def write_csv(path: Path, rows: list[dict[str, str]] = ROWS, between: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([between.join(rows[0]), *(between.join(row.values()) for row in rows)]))
    return path


def write_images(folder: Path, *classes: str, count: int = 10) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / name / f"{number}.png")
    return folder


def one_csv(folder: Path) -> Path:
    return write_csv(folder / "reviews.csv")


def one_csv_of_windows(folder: Path) -> Path:
    return write_csv(folder / "REVIEWS.CSV")


def one_tsv(folder: Path) -> Path:
    return write_csv(folder / "reviews.tsv", between="\t")


def one_json(folder: Path) -> Path:
    (folder / "reviews.json").write_text(json.dumps(ROWS))
    return folder / "reviews.json"


def one_jsonl(folder: Path) -> Path:
    (folder / "reviews.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder / "reviews.jsonl"


def one_parquet(folder: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(folder / "reviews.parquet")
    return folder / "reviews.parquet"


def a_folder(folder: Path) -> Path:
    return write_csv(folder / "reviews.csv").parent


@pytest.mark.parametrize("make", [one_csv, one_csv_of_windows, one_tsv, one_json, one_jsonl, one_parquet, a_folder])
def test_a_share_of_a_single_file_is_held_out(tmp_path: Path, texts: Recipe, make: Callable[[Path], Path]) -> None:
    task = load_task(replace(texts, data=str(make(tmp_path))))
    labels = {
        split: Counter(examples[index]["labels"] for index in range(len(examples)))
        for split, examples in task.splits.items()
    }
    assert labels == {"train": {0: 24, 1: 8}, "validation": {0: 6, 1: 2}}  # each class in proportion
    assert any("20 % of train, seed 0" in line for line in task.summary)
    assert any("no test split" in line for line in task.summary)


def test_a_held_out_share_is_the_same_every_time_and_in_no_other_split(tmp_path: Path, texts: Recipe) -> None:
    recipe = replace(texts, data=str(one_csv(tmp_path)))

    def read(recipe: Recipe, split: str) -> set[str]:
        data = load_task(recipe, (split,)).splits[split].data  # type: ignore[attr-defined]
        return set(data["text"])

    validation = read(recipe, "validation")
    assert validation == read(recipe, "validation")
    assert read(recipe, "train") == {row["text"] for row in ROWS} - validation  # also where only it is asked for
    assert validation != read(replace(recipe, shift_seed=1), "validation")


def test_a_folder_of_images_without_splits(tmp_path: Path, images: Recipe) -> None:
    task = load_task(replace(images, data=str(write_images(tmp_path, "a", "b", "c"))))
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 24, "validation": 6}


def test_images_that_pandas_wrote(tmp_path: Path, images: Recipe) -> None:
    """Bytes and path of each, without the types of `datasets`."""
    stored = [file.read_bytes() for file in sorted(write_images(tmp_path, "a", "b").rglob("*.png"))]
    cells = [{"bytes": image, "path": None} for image in stored]
    table = pa.table({"image": pa.array(cells), "label": [index // 10 for index in range(len(cells))]})
    pq.write_table(table, tmp_path / "images.parquet")
    task = load_task(replace(images, data=str(tmp_path / "images.parquet"), new_head=True))
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 16, "validation": 4}


def test_train_and_test_only(tmp_path: Path, images: Recipe) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / split, "a", "b", "c", count=5)
    recipe = replace(images, data=str(tmp_path))
    assert {split: len(each) for split, each in load_task(recipe).splits.items()} == {
        "train": 12,
        "validation": 3,
        "test": 15,
    }
    named = load_task(replace(recipe, splits={"validation": "test"}))
    assert {split: len(each) for split, each in named.splits.items()} == {"train": 15, "validation": 15}
    none = load_task(replace(recipe, splits={"test": None}))
    assert {split: len(each) for split, each in none.splits.items()} == {"train": 12, "validation": 3}
    assert measured_split(recipe)[0] == "test"
    assert measured_split(replace(recipe, splits={"validation": "test"}))[0] == "validation"


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_data_without_classes_are_measured_on_validation_where_there_is_no_test_split(
    task: str, tmp_path: Path
) -> None:
    assert measured_split(replace(TOY_TASKS[task](tmp_path), splits={"test": None}))[0] == "validation"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"validation": "tset"}, "'tset'.*'test'.*train, test"),
        ({"dev": "test"}, "'dev'.*validation"),
        ({"validation": "test", "test": "test"}, "two uses"),
        ({"validation": "train"}, "none is called train.*splits: {train: "),
    ],
)
def test_splits_that_cannot_be(tmp_path: Path, texts: Recipe, splits: dict[str, str], message: str) -> None:
    for name in ("train", "test"):
        write_csv(tmp_path / f"{name}.csv")
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(texts, data=str(tmp_path), splits=splits))


def nested(folder: Path) -> None:
    write_images(folder / "train", "a", "b")
    write_images(folder / "train" / "test", "a", "b")


def class_called_test(folder: Path) -> None:
    write_images(folder / "train", "cup", "test_tube")
    write_images(folder / "validation", "cup", "test_tube")


def class_called_train(folder: Path) -> None:
    write_images(folder, "car", "train")


def stray_file(folder: Path) -> None:
    write_csv(folder / "train.csv")
    write_csv(folder / "more.csv")


def two_formats(folder: Path) -> None:
    write_csv(folder / "a.csv")
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


def script(folder: Path) -> None:
    write_csv(folder / "a.csv")
    (folder / f"{folder.name}.py").write_text("raise RuntimeError('ran')")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nested, "20 files are both in train and test, such as train/test/a/0.png"),
        (class_called_test, "both in .*, such as train/test_tube/0.png"),
        (class_called_train, "10 files are in no split, such as car/0.png"),
        (stray_file, "1 file is in no split, such as more.csv"),
        (two_formats, "in no split"),
        (script, r"\.py, a loading script"),
    ],
)
def test_folders_that_would_be_read_otherwise_than_meant(
    tmp_path: Path, images: Recipe, make: Callable[[Path], None], message: str
) -> None:
    """A class called train hid all others, and a folder in a folder was trained and tested on, without a word."""
    make(tmp_path)
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(images, data=str(tmp_path)))


def test_a_folder_is_the_same_by_another_path(tmp_path: Path, texts: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "test"):
        write_csv(tmp_path / "real" / f"{name}.csv")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "files").mkdir()
    for name in ("train", "test"):
        (tmp_path / "files" / f"{name}.csv").symlink_to(tmp_path / "real" / f"{name}.csv")
    monkeypatch.chdir(tmp_path)
    for data in ("real", "./real", "link", str(tmp_path / "link"), "files"):
        assert len(load_task(replace(texts, data=data)).splits["validation"]) == 8


@pytest.mark.parametrize("count", [2, 4])
def test_too_few_rows_to_hold_out(tmp_path: Path, texts: Recipe, count: int) -> None:
    rows = [
        {"text": f"now {number}", "label": f"c{number // 2}" if count > 2 else f"c{number}"} for number in range(count)
    ]
    recipe = replace(texts, data=str(write_csv(tmp_path / "a.csv", rows)))
    if count == 2:
        with pytest.raises(SurgicalError, match="no validation split, and 2 training rows are too few"):
            load_task(recipe)
    else:
        assert len(load_task(recipe).splits["validation"]) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.csv", "text,label\n", "split train is empty"), ("a.csv", "", "No columns"), ("a.xlsx", "x", r"\.csv, \.tsv")],
)
def test_files_without_rows(tmp_path: Path, texts: Recipe, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(texts, data=str(tmp_path / name)))


def test_a_configuration_is_for_data_that_have_some(tmp_path: Path, texts: Recipe) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: long, data_files: long.csv}\n- {config_name: short, data_files: short.csv}\n---\n"
    )
    write_csv(tmp_path / "long.csv")
    write_csv(tmp_path / "short.csv", ROWS[:20])
    recipe = replace(texts, data=str(tmp_path))
    with pytest.raises(SurgicalError, match=r"long.*short"):
        load_task(recipe)
    assert len(load_task(replace(recipe, data_config="short")).splits["train"]) == 16
    with pytest.raises(SurgicalError, match=r"data_config='short'.*one file"):
        load_task(replace(recipe, data=str(tmp_path / "long.csv"), data_config="short"))


def test_the_only_row_of_a_class_is_never_held_out() -> None:
    labels = np.array([0] * 10 + [1] + [2] * 5)
    for seed in range(20):
        mask = held_out(labels, seed)
        assert not mask[10] and mask.sum() == 3
        assert {*labels[~mask].tolist()} == {0, 1, 2}


def test_splits_of_other_names_are_told(tmp_path: Path, texts: Recipe) -> None:
    """A data set of the Hub may call its validation split `validation_matched`."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: a.csv}\n"
        "  - {split: validation_matched, path: b.csv}\n---\n"
    )
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv")
    recipe = replace(texts, data=str(tmp_path))
    assert any("not used: validation_matched" in line for line in load_task(recipe).summary)
    named = load_task(replace(recipe, splits={"validation": "validation_matched"}))
    assert len(named.splits["train"]) == len(named.splits["validation"]) == 40
