"""`surgical-peft predict`: images and texts, labels by name, and what the model writes or marks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from PIL.ExifTags import Base
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.experiments.predict import predict
from surgical_peft.experiments.tasks import load_task
from tests.support.cli import run
from tests.support.toy_tasks import TOY_TASKS

AUTO: dict[str, Any] = {
    "image_classification": AutoModelForImageClassification,
    "text_classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
NAMES = {0: "ham", 1: "spam"}


def adapter_of(task: str, folder: Path, **config: Any) -> Path:
    """An adapter of the task's toy model, which only names its labels anew."""
    model = AUTO[task].from_pretrained(TOY_TASKS[task](folder).model, **config)
    blocks = ["decoder.1"] if task == "seq2seq" else [-1]
    to_save = ["classifier"] if config else None
    get_peft_model(model, SurgicalConfig(blocks=blocks, modules_to_save=to_save)).save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_images_are_read_as_in_training(tmp_path: Path) -> None:
    """A photograph is turned as its camera says, 16 bits a pixel become 8, what is transparent becomes white."""
    recipe = TOY_TASKS["image_classification"](tmp_path)
    adapter = adapter_of("image_classification", tmp_path / "model")
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[Base.Orientation] = 6
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "a/turned.jpg": (Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)), {"exif": turned}),
        "b/deep.png": (Image.fromarray(rng.integers(0, 2**16, (8, 8), dtype=np.uint16)), {}),
        "c/clear.png": (Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)), {}),
    }
    for split in ("train", "validation"):
        for name, (image, options) in images.items():
            file = tmp_path / "photos" / split / name
            file.parent.mkdir(parents=True)
            image.save(file, **options)
    task = load_task(replace(recipe, data=str(tmp_path / "photos"), corruption=None), ["validation"])
    base = task.load_model().eval()
    for name, example in zip(images, task.splits["validation"], strict=True):
        with torch.no_grad():
            scores = base(pixel_values=example["pixel_values"][None]).logits[0].softmax(-1)
        predicted = predict(adapter, [str(tmp_path / "photos" / "validation" / name)])[0].labels
        assert sorted(predicted.values()) == pytest.approx(scores.sort().values.tolist(), abs=1e-6)


@pytest.mark.parametrize("given", ["", " \n", "nothere.txt", "nothere.CSV", "here.csv"])
def test_what_is_no_text_is_told(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of("text_classification", tmp_path)
    (tmp_path / "here.csv").write_text("text\nnow\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgicalError, match=r"no text|no file|table"):
        predict(adapter, [given])
    assert predict(adapter, ["now in nothere.txt"])[0].labels


def test_a_whole_model_is_told_from_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="pipeline"):
        predict(TOY_TASKS["text_classification"](tmp_path).model, ["now"])


def test_images(tmp_path: Path) -> None:
    """Of any mode, as in training; the pixels that the processor makes, and probabilities."""
    adapter = adapter_of("image_classification", tmp_path)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for mode in ("L", "RGBA"):
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.png")
    gray, color = predict(adapter, [str(tmp_path / "L.png"), str(tmp_path / "RGBA.png")])
    assert gray.labels == color.labels and sum(gray.labels.values()) == pytest.approx(1)
    assert list(gray.labels.values()) == sorted(gray.labels.values(), reverse=True)
    for wrong in (tmp_path / "none.png", tmp_path / "adapter" / "adapter_config.json"):
        with pytest.raises(SurgicalError, match=wrong.name):
            predict(adapter, [str(wrong)])


def test_texts_and_files_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of("text_classification", tmp_path, id2label=NAMES)
    (tmp_path / "mails.txt").write_text("free money\n\nmeet us at noon\n")
    long = "free money " * 200  # longer than the model takes, and than a file's name
    assert run(monkeypatch, "predict", str(adapter), str(tmp_path / "mails.txt"), long, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["input"] for row in rows] == ["free money", "meet us at noon", long]
    assert all(row["labels"].keys() == {"ham", "spam"} for row in rows)
    assert run(monkeypatch, "predict", str(adapter), "free money") == 0
    top = next(iter(rows[0]["labels"]))
    assert f"free money: {top} 0." in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "labels"), [("regression", 1), ("multi_label_classification", 2)])
def test_values_of_other_kinds_of_labels(kind: str, labels: int, tmp_path: Path) -> None:
    names = {label: f"trait {label}" for label in range(labels)}
    how = {"id2label": names, "problem_type": kind, "ignore_mismatched_sizes": True}
    adapter = adapter_of("text_classification", tmp_path, **how)
    scores = predict(adapter, ["free money"])[0].labels
    assert scores.keys() == set(names.values())
    assert sum(scores.values()) != pytest.approx(1)  # no softmax over them


def test_the_problem_of_a_head_that_is_not_new_comes_along(tmp_path: Path) -> None:
    """Also where the base says another one, as any classifier that Trainer has trained does."""
    base = Path(TOY_TASKS["text_classification"](tmp_path).model)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "problem_type": "single_label_classification"}))
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(base, problem_type="multi_label_classification")
    tuned: Any = get_peft_model(model, SurgicalConfig(blocks=[-1]))
    tuned.save_pretrained(tmp_path / "many")
    get_peft_model(load(base), SurgicalConfig(blocks=[-1])).save_pretrained(tmp_path / "one")
    totals = {name: sum(predict(tmp_path / name, ["win"])[0].labels.values()) for name in ("many", "one")}
    assert totals["one"] == pytest.approx(1) and totals["many"] != pytest.approx(1)
    tuned.load_adapter(tmp_path / "one", adapter_name="one")
    tuned.set_adapter("one")
    tuned.set_adapter("default")
    assert tuned.config.problem_type == "multi_label_classification"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    adapter = adapter_of("text_classification", tmp_path)
    (tmp_path / "mails.doc").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(SurgicalError, match="mails"):
        predict(adapter, [str(tmp_path / "mails.doc")])


@pytest.mark.parametrize("task", ["token_classification", "causal_lm", "seq2seq"])
def test_what_is_marked_or_written(task: str, tmp_path: Path) -> None:
    prediction = predict(adapter_of(task, tmp_path), ["Ada lives in Berlin"])[0]
    assert (prediction.text is not None) == (task != "token_classification") and prediction.labels == {}
    assert all(word["label"] for word in prediction.words)


def test_a_word_of_several_tokens_is_marked_once(tmp_path: Path) -> None:
    """As in training, where its first token alone bears a tag."""
    adapter = adapter_of("token_classification", tmp_path, id2label={label: f"kind {label}" for label in range(5)})
    pieces = Tokenizer(WordPiece({"[PAD]": 0, "[UNK]": 1, "ber": 2, "##lin": 3}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = WhitespaceSplit(), decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(adapter)
    (word,) = predict(adapter, ["berlin"])[0].words
    assert word["word"] == "berlin" and word["label"].startswith("kind")


def test_what_cannot_be_predicted_is_said(tmp_path: Path) -> None:
    adapter = adapter_of("text_classification", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(SurgicalError, match="tokenizer"):
        predict(adapter, ["free money"])
    with pytest.raises(SurgicalError, match="no adapter"):
        predict(tmp_path / "model", ["free money"])
    with pytest.raises(SurgicalError, match="base model"):
        predict(adapter, ["free money"], str(tmp_path / "none"))


def test_what_is_no_image_is_not_waited_for(tmp_path: Path) -> None:
    """A named pipe hung, a bomb and a zero byte ended in tracebacks."""
    adapter = adapter_of("image_classification", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    for name in ("pipe", "bomb.png", "a\0b", "none"):
        with pytest.raises(SurgicalError, match="cannot be read as an image"):
            predict(adapter, [str(tmp_path / name)])
