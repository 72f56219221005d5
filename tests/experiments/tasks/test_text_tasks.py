"""What tasks on text do with rows, columns and labels, and what they measure, against plain references."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from peft import get_peft_model
from tokenizers.pre_tokenizers import Digits, Sequence, WhitespaceSplit
from torch import nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.shifts import casing, character_noise
from surgical_peft.experiments.tasks import load_task
from tests.support.toy_tasks import SIZES, TAGS, TOY_TASKS, bert, write_data, write_model


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    made = {name: make(tmp_path_factory.mktemp(name)) for name, make in TOY_TASKS.items()}
    made["text_classification"] = replace(made["text_classification"], character_noise=None)
    return made


def folder_of(folder: Path, rows: list[dict[str, Any]], features: Any = None) -> str:
    """A folder with the same rows for training and validation."""
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features and Features(features)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


MAILS = [
    {"text": "win money", "label": "spam"},
    {"text": "meet at noon", "label": "ham"},
    {"text": "now", "label": "ham"},
]


def write_csv(folder: Path) -> None:
    lines = ["text,label", *(f"{each['text']},{each['label']}" for each in MAILS)]
    for name in ("train.csv", "dev.csv"):
        (folder / name).write_text("\n".join(lines))


def write_json(folder: Path) -> None:
    for name in ("train.jsonl", "validation.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, MAILS)))


def write_parquet(folder: Path) -> None:
    folder_of(folder, MAILS)


@pytest.mark.parametrize("write", [write_csv, write_json, write_parquet])
def test_files_of_any_format(tmp_path: Path, toys: dict[str, Recipe], write: Any) -> None:
    write(tmp_path)
    recipe = replace(toys["text_classification"], data=str(tmp_path))
    splits = load_task(recipe, ("train", "validation")).splits
    for examples in splits.values():
        assert [examples[index]["labels"] for index in range(3)] == [1, 0, 0]  # in alphabetical order


def test_labels_are_matched_by_name_where_the_model_knows_the_names(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    model = bert(BertForSequenceClassification, 3, id2label={0: "spam", 1: "other", 2: "ham"})
    recipe = replace(
        toys["text_classification"],
        model=str(write_model(tmp_path / "model", model)),
        data=folder_of(tmp_path / "data", MAILS),
    )
    examples = load_task(recipe, ("train",)).splits["train"]
    assert [examples[index]["labels"] for index in range(3)] == [0, 2, 2]
    flipped = load_task(replace(recipe, label_map={"ham": 0, "spam": 1}), ("train",)).splits["train"]
    assert [flipped[index]["labels"] for index in range(3)] == [1, 0, 0]


def test_labels_that_are_numbers(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    rows = [{"body": "win", "y": 1}, {"body": "now", "y": 0}]
    recipe = replace(toys["text_classification"], data=folder_of(tmp_path / "a", rows))
    examples = load_task(recipe, ("train",)).splits["train"]
    assert [examples[index]["labels"] for index in range(2)] == [1, 0]  # columns found by their types
    below = folder_of(tmp_path / "b", [{"body": "win", "y": 1}, {"body": "now", "y": -1}])
    with pytest.raises(SurgicalError, match=r"-1, 1.*new_head: true"):
        load_task(replace(recipe, data=below), ("train",))
    beyond = folder_of(tmp_path / "c", [{"body": "win", "y": 7}, {"body": "now", "y": 0}])
    with pytest.raises(SurgicalError, match=r"8 classes.*0 to 1.*new_head: true"):
        load_task(replace(recipe, data=beyond), ("train",))


TWO = [{"subject": "a", "body": "win", "kind": "ham"}, {"subject": "b", "body": "now", "kind": "spam"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "subject.*body.*kind.*text_classification.*columns"),
        ({"text": "bodi", "label": "kind"}, "'bodi'.*'body'.*subject"),
        ({"txt": "body"}, "text_classification.*'txt'.*'text'.*text, label"),
        ({"text": "body"}, "subject.*kind.*label"),
        ({"text": "body", "label": "kind"}, None),
    ],
)
def test_columns_are_named_where_their_types_do_not_tell(
    tmp_path: Path, toys: dict[str, Recipe], columns: dict[str, str], message: str | None
) -> None:
    recipe = replace(toys["text_classification"], data=folder_of(tmp_path, TWO), columns=columns)
    if message is None:
        assert len(load_task(recipe, ("train",)).splits["train"]) == 2
    else:
        with pytest.raises(SurgicalError, match=message):
            load_task(recipe, ("train",))


@pytest.mark.parametrize("columns", [{}, {"label": "label"}])
def test_labels_of_a_type_that_does_not_fit(tmp_path: Path, toys: dict[str, Recipe], columns: dict[str, str]) -> None:
    """For float labels it said `name it in the recipe`, which cannot help."""
    data = folder_of(tmp_path, [{"text": "now", "label": 0.0}, {"text": "win", "label": 1.0}])
    said = r"label of text_classification.* it takes classes: names, whole numbers or a ClassLabel.*label \(float64\)"
    with pytest.raises(SurgicalError, match=said) as stop:
        load_task(replace(toys["text_classification"], data=data, columns=columns), ("train",))
    assert "name it" not in str(stop.value)


@pytest.mark.parametrize("text", ["", "  \n", None])
def test_rows_without_text_are_refused(tmp_path: Path, toys: dict[str, Recipe], text: str | None) -> None:
    data = folder_of(tmp_path, [*MAILS, {"text": text, "label": "ham"}])
    with pytest.raises(SurgicalError, match=r"train.*text has 1 empty cell, row 3 of 4"):
        load_task(replace(toys["text_classification"], data=data), ("train",))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("text_classification", {"corruption": "contrast"}, "corruption='contrast'.*text_classification"),
        ("text_classification", {"character_noise": 120.0}, "character_noise=120.0"),
        ("text_classification", {"casing": 0.0}, "casing=0.0"),
        ("text_classification", {"max_length": 17}, "max_length=17.*1 to 16"),
        ("text_classification", {"max_length": 0}, "max_length=0"),
        ("token_classification", {"label_map": [0, 1, 2, 3, None]}, "tag"),
        ("token_classification", {"imbalance": {"O": 0.5}}, "imbalance=.*token_classification"),
        ("token_classification", {"metric": "exact_match"}, "span_f1, accuracy"),
        ("causal_lm", {"new_head": True}, "new_head=True.*causal_lm"),
        ("causal_lm", {"label_map": [1, 0]}, "label_map=.*causal_lm"),
        ("causal_lm", {"metric": "exact_match"}, "exact_match.*no prompt"),
        ("causal_lm", {"metric": "macro_f1"}, "accuracy, log_likelihood"),
        ("seq2seq", {"metric": "rouge"}, "'rouge'.*accuracy, exact_match"),
    ],
)
def test_what_does_not_fit_is_named(toys: dict[str, Recipe], task: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(toys[task], **change))


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        (
            "text_classification",
            {"text": "now", "label": "ham"},
            "'label'.*train.*'ham'",
        ),
        (
            "token_classification",
            {"tokens": ["now"], "tags": ["O"]},
            "'tags'.*train.*'O'",
        ),
    ],
)
def test_one_class_only(
    task: str, row: dict[str, Any], said: str, new_head: bool, tmp_path: Path, toys: dict[str, Recipe]
) -> None:
    """With a new head the model was blamed: `MODEL: there is one label only`."""
    recipe = replace(toys[task], data=folder_of(tmp_path, [row] * 3), new_head=new_head)
    with pytest.raises(SurgicalError, match=f"^{tmp_path}.*{said}"):
        load_task(recipe, ("train",))


def test_a_label_map_beyond_the_labels_of_the_model(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    recipe = replace(toys["text_classification"], data=folder_of(tmp_path, MAILS), label_map=[0, 5])
    with pytest.raises(SurgicalError, match=r"label_map=\[0, 5\].*0 to 1.*new_h"):
        load_task(recipe, ("train",))


def test_one_label_only(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    recipe = replace(toys["text_classification"], data=folder_of(tmp_path / "data", MAILS))
    with pytest.raises(SurgicalError, match=r"train.*label 0 \(column 'label'\)"):
        load_task(replace(recipe, label_map={"ham": 0, "spam": 0}), ("train",))
    with pytest.raises(SurgicalError, match=r"'spam': 0\}.*one label"):
        load_task(replace(recipe, label_map={"ham": 0, "spam": 0}, new_head=True), ("train",))
    model = tmp_path / "model"
    write_model(model, bert(BertForSequenceClassification, 1))
    with pytest.raises(SurgicalError, match=f"{model}.*one label.*new_head: true"):
        load_task(replace(recipe, model=str(model)), ("train",))


def test_a_shift_depends_on_place_split_and_seed_alone(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    recipe = replace(toys["text_classification"], data=folder_of(tmp_path, MAILS), character_noise=40.0, casing=30.0)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    for seed in (0, 1):
        splits = load_task(replace(recipe, shift_seed=seed), ("train", "validation")).splits
        for split, examples in splits.items():
            rng = np.random.default_rng((zlib.crc32(split.encode()), 1, seed))
            text = casing(character_noise(MAILS[1]["text"], 40, rng), 30, rng)
            assert examples[1]["input_ids"] == tokenizer(text)["input_ids"]


def test_casing_for_a_tokenizer_that_does_not_see_it(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    model = write_model(tmp_path, bert(BertForSequenceClassification, 2), lowercase=True)
    recipe = replace(toys["text_classification"], model=str(model))
    assert load_task(replace(recipe, character_noise=10.0))
    with pytest.raises(SurgicalError, match=r"casing=50.0"):
        load_task(replace(recipe, casing=50.0))


def test_a_model_that_was_not_trained_for_the_task(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    encoder = BertModel(bert(BertForSequenceClassification, 2).config)
    recipe = replace(toys["text_classification"], model=str(write_model(tmp_path, encoder)))
    with pytest.raises(SurgicalError, match=r"classifier\.bias, classifier\.weight.*new_head: true"):
        load_task(recipe).load_model()
    model = load_task(replace(recipe, new_head=True)).load_model()
    assert model.config.id2label == {0: "ham", 1: "spam"}
    assert all(value.equal(encoder.state_dict()[name]) for name, value in model.bert.state_dict().items())


def test_a_decoder_that_classifies_finds_the_last_token(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    """Its config names no token to pad with, by which it tells the end of a text."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=16, num_labels=2)
    model = GPT2ForSequenceClassification(config)
    recipe = replace(
        toys["text_classification"],
        model=str(write_model(tmp_path / "model", model, pad_token=None)),
        data=folder_of(tmp_path / "data", MAILS),
    )
    task = load_task(recipe, ("train",))
    examples, loaded = [task.splits["train"][index] for index in range(3)], task.load_model()
    with torch.inference_mode():
        together = loaded(**task.collate(examples)).logits
        for index, example in enumerate(examples):
            alone = loaded(input_ids=torch.tensor([example["input_ids"]])).logits[0]
            assert torch.allclose(together[index], alone, atol=1e-6)


@pytest.fixture(scope="module")
def split_words(tmp_path_factory: pytest.TempPathFactory, toys: dict[str, Recipe]) -> Recipe:
    """Token classification where every digit of a word is a token of its own."""
    folder = tmp_path_factory.mktemp("digits")
    task = load_task(toys["token_classification"], ("train",))
    task.load_model().save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(toys["token_classification"].model)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Digits(individual_digits=True)])
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"tokens": ["Ada12", "lives", "in", "Berlin7"], "tags": ["B-PER", "O", "O", "B-LOC"]},
        {"tokens": ["Berlin", "now"], "tags": ["B-LOC", "O"]},
    ]
    data = folder_of(folder / "data", rows, {"tokens": List(Value("string")), "tags": List(Value("string"))})
    return replace(toys["token_classification"], model=str(folder / "model"), data=data)


def test_the_first_token_of_a_word_bears_its_tag(split_words: Recipe) -> None:
    examples = load_task(split_words, ("train",)).splits["train"]
    assert examples[0]["labels"] == [1, -100, -100, 0, 0, 3, -100]  # tags by the names that the model knows
    assert examples[1]["labels"] == [3, 0]
    cut = load_task(replace(split_words, max_length=4), ("train",)).splits["train"]
    assert cut[0]["labels"] == [1, -100, -100, 0]


class Says(nn.Module):
    """Predicts for each token a tag by its id."""

    def __init__(self, tags: dict[int, int]) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))
        self.tags = tags

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        tags = torch.tensor([[self.tags.get(token, 0) for token in row] for row in input_ids.tolist()])
        return type("Output", (), {"logits": nn.functional.one_hot(tags, len(TAGS)).float()})


@pytest.mark.parametrize(("metric", "expected"), [(None, 0.8), ("accuracy", 5 / 6), ("macro_f1", (6 / 7 + 0 + 1) / 3)])
def test_tags_are_measured_by_word(split_words: Recipe, metric: str | None, expected: float) -> None:
    """By hand: of Ada12 lives in Berlin7, Berlin now, only Ada is missed."""
    task = load_task(replace(split_words, metric=metric), ("train",))
    tokenizer = AutoTokenizer.from_pretrained(split_words.model)
    ada, berlin = tokenizer.convert_tokens_to_ids(["Ada", "Berlin"])
    assert task.measure(Says({berlin: 3}), task.splits["train"]) == pytest.approx(expected)
    assert task.measure(Says({berlin: 3, ada: 1}), task.splits["train"]) == 1


def test_words_and_tags_of_different_number(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    rows = [{"tokens": ["Ada", "now"], "tags": ["O", "O"]}, {"tokens": ["Ada"], "tags": ["B-PER", "O"]}]
    with pytest.raises(SurgicalError, match=r"train.*row 1 .*1 words.*2 tags"):
        load_task(replace(toys["token_classification"], data=folder_of(tmp_path, rows)), ("train",))


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_tokens_are_measured_as_one_text_at_a_time_would_be(toys: dict[str, Recipe], task: str) -> None:
    """Padding counts for nothing, and every token for as much as any other."""
    loaded = {
        metric: load_task(replace(toys[task], metric=metric), ("train",)) for metric in ("accuracy", "log_likelihood")
    }
    model = loaded["accuracy"].load_model()
    examples = loaded["accuracy"].splits["train"]
    hits = total = 0
    likelihood = 0.0
    for index in range(len(examples)):
        example = {name: torch.tensor([values]) for name, values in examples[index].items()}
        with torch.inference_mode():
            output = model(**example)
        logits, labels = output.logits[0], example["labels"][0]
        if task == "causal_lm":
            logits, labels = logits[:-1], labels[1:]
        hits += int((logits.argmax(-1) == labels).sum())
        total += len(labels)
        likelihood -= float(output.loss) * len(labels)
    assert loaded["accuracy"].measure(model, examples) == pytest.approx(hits / total)
    assert loaded["log_likelihood"].measure(model, examples) == pytest.approx(likelihood / total, rel=1e-5)


def test_what_a_model_writes_is_measured_as_it_writes_alone(toys: dict[str, Recipe]) -> None:
    recipe = replace(toys["seq2seq"], metric="exact_match")
    task = load_task(recipe, ("train",))
    model, tokenizer = task.load_model(), AutoTokenizer.from_pretrained(recipe.model)
    examples = task.splits["train"]
    written = []
    for index in range(len(examples)):
        ids = torch.tensor([examples[index]["input_ids"]])
        written.append(tokenizer.decode(model.generate(ids, max_new_tokens=2)[0], skip_special_tokens=True).strip())
    targets = [tokenizer.decode(examples[index]["labels"], skip_special_tokens=True) for index in range(len(examples))]
    expected = sum(map(str.__eq__, written, targets)) / len(examples)
    assert task.measure(model, examples) == expected


class Repeats(nn.Module):
    """Writes the word at a place of the text, and no more."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.device = nn.Parameter(torch.zeros(1))
        self.place = place

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        word = input_ids[:, self.place : self.place + 1]
        return torch.cat([torch.zeros_like(word), word, torch.ones_like(word), torch.zeros_like(word)], dim=1)


def test_a_wrapped_model_writes_the_same(toys: dict[str, Recipe]) -> None:
    task = load_task(replace(toys["seq2seq"], metric="exact_match"), ("train",))
    example = {name: torch.tensor([values]) for name, values in task.splits["train"][0].items() if name != "labels"}
    model = task.load_model()
    alone = model.generate(**example, max_new_tokens=4)
    wrapped = get_peft_model(model, SurgicalConfig(blocks=["decoder.1"]))
    assert torch.equal(wrapped.generate(**example, max_new_tokens=4), alone)
    assert 0 <= task.measure(wrapped, task.splits["train"]) <= 1


def test_exact_match_of_what_is_written(toys: dict[str, Recipe]) -> None:
    """The target is the first word of the text."""
    task = load_task(replace(toys["seq2seq"], metric="exact_match"), ("train",))
    examples = task.splits["train"]
    same = [examples[index]["input_ids"][1] == examples[index]["input_ids"][0] for index in range(len(examples))]
    assert task.measure(Repeats(0), examples) == 1
    assert task.measure(Repeats(1), examples) == sum(same) / len(same) < 0.5


def test_text_alone_is_shifted_in_seq2seq(toys: dict[str, Recipe]) -> None:
    plain = load_task(toys["seq2seq"], ("train",)).splits["train"]
    noisy = load_task(replace(toys["seq2seq"], character_noise=60.0), ("train",)).splits["train"]
    pairs = [(plain[index], noisy[index]) for index in range(len(plain))]
    assert all(a["labels"] == b["labels"] for a, b in pairs)
    assert any(a["input_ids"] != b["input_ids"] for a, b in pairs)


def test_nothing_to_measure(tmp_path: Path, toys: dict[str, Recipe]) -> None:
    """A language model predicts nothing for a text of one token."""
    data = write_data(tmp_path, lambda number, rng: {"text": "now"}, {"text": Value("string")})
    task = load_task(replace(toys["causal_lm"], data=str(data)))
    assert len(task.splits["test"]) == SIZES["test"]
    with pytest.raises(SurgicalError, match="nothing to measure"):
        task.measure(task.load_model(), task.splits["test"])
