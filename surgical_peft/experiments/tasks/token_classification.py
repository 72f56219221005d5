"""Words with a tag each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import List
from numpy.random import Generator
from torch import nn
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification

from ...errors import SurgicalError
from ...scoring.batches import IGNORED
from ..metrics import load_metric
from ..recipe.recipe import Recipe
from .cells import cells_of
from .columns import LABEL, TEXT, list_of
from .dataset import open_data
from .evaluation import Batch, Measure, check_metric
from .labels import class_names, class_numbers, fit_labels
from .source_model import model_loader
from .task import Task, TinyTask, with_info
from .text_examples import Texts, Tokenizing, plain, tokenizing
from .tiny_data import TEXT_CONFIG, label_feature, save_tokenizer, text_feature, words

BATCH_SIZE = 64  # of measuring
_BY_WORD = ("accuracy", "macro_f1", "matthews_correlation")


_TINY_TAGS = {"Ada": "B-PER", "Lovelace": "I-PER", "Berlin": "B-LOC", "Bay": "I-LOC"}


def _row(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words, some of them names."""
    names = list(_TINY_TAGS)[:2] if place % 2 else list(_TINY_TAGS)[2:]
    tokens = [*words(rng), *names]
    return {"tokens": tokens, "tags": [classes.index(_TINY_TAGS.get(token, "O")) for token in tokens]}


@with_info(
    keys=["label_map", "new_head", "character_noise", "casing", "max_length"],
    pipeline="token-classification",
    tiny=TinyTask(
        AutoModelForTokenClassification,
        {
            "tokens": lambda classes: List(text_feature(classes)),
            "tags": lambda classes: List(label_feature(classes)),
        },
        _row,
        save_tokenizer,
        lambda recipe: ["O", *_TINY_TAGS.values()],
        TEXT_CONFIG,
    ),
)
def token_classification(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Words with a tag each, and a model that `AutoModelForTokenClassification` loads.

    Columns: `tokens`, a list of words, and `tags`, a list of classes, their names or numbers. The first token of a
    word bears its tag. Metrics: `span_f1` (default) on IOB2 tags; `accuracy`, `macro_f1` and `matthews_correlation` of
    words. What is cut off at `max_length` is not measured.
    """
    metric = recipe.metric or "span_f1"
    check_metric(metric, "span_f1", *_BY_WORD)
    how = tokenizing(recipe)
    if not how.tokenizer.is_fast:
        raise SurgicalError(
            f"{recipe.model}: its tokenizer does not say which word a token is of: it must be a fast one."
        )
    data = open_data(recipe, splits, {"tokens": list_of(TEXT), "tags": list_of(LABEL)}, classes="tags")
    columns, column = data.columns, data.columns["tags"]
    tags_of_train = pc.list_flatten(cells_of(data.reference, column))
    classes = class_names(data.reference.features[column].feature, tags_of_train)
    label_map, count, summary = fit_labels(recipe, column, classes, how.config)
    if None in label_map:
        raise SurgicalError(
            f"label_map={recipe.label_map}: a tag cannot be left out. There are: {', '.join(classes)}."
        )
    tags = {
        split: _tags(rows, columns, classes, label_map, f"{recipe.data}, split {split}")
        for split, rows in data.splits.items()
    }
    names = classes if recipe.label_map is None else None
    shown = names if recipe.new_head and names else [how.config.id2label.get(i, str(i)) for i in range(count)]
    collate = plain(DataCollatorForTokenClassification(how.tokenizer))
    read = partial(_read_words, None if metric in _BY_WORD else shown)
    return Task(
        load_model=model_loader(AutoModelForTokenClassification, recipe, count, names),
        splits={
            split: Texts(
                rows,
                list(range(len(rows))),
                partial(_read, how, columns["tokens"], tags[split]),
                partial(how.rng, split),
            )
            for split, rows in data.splits.items()
        },
        collate=collate,
        processor=how.tokenizer,
        metric=metric,
        measure=Measure(load_metric(metric), read, collate, BATCH_SIZE),
        names_labels=True,
        summary=data.summary + summary,
    )


def _tags(data: Any, columns: dict[str, str], classes: list[str], label_map: list[Any], where: str) -> list[list[int]]:
    tokens, tags = (cells_of(data, columns[role]).combine_chunks() for role in ("tokens", "tags"))
    words, sizes = (np.asarray(pc.list_value_length(cells)) for cells in (tokens, tags))
    if len(different := np.flatnonzero(words != sizes)):
        row = different[0]
        raise SurgicalError(
            f"{where}: {len(different):,} rows have another number of words than of tags; row {row} has {words[row]} "
            f"words and {sizes[row]} tags."
        )
    numbers = class_numbers(data.features[columns["tags"]], tags, classes, where)
    labels = [label_map[number] for number in numbers]
    ends = np.cumsum(sizes)
    return [labels[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _read(
    how: Tokenizing, column: str, tags: list[list[int]], row: dict[str, Any], index: int, rng: Generator
) -> dict[str, Any]:
    tokens = how.tokens([how.shifted(word, rng) for word in row[column]], is_split_into_words=True)
    labels, before = [], None
    for word in tokens.word_ids():
        labels.append(IGNORED if word is None or word == before else tags[index][word])
        before = word
    return {**tokens, "labels": labels}


def _read_words(names: list[str] | None, model: nn.Module, batch: Batch) -> tuple[list[Any], list[Any]]:
    """Tags by name, a list for each example; or, without `names`, all tags by number in one list."""
    labels = batch.pop("labels")
    predicted = model(**batch).logits.argmax(-1)
    told = labels != IGNORED
    if names is None:
        return predicted[told].tolist(), labels[told].tolist()
    pairs = [
        (row[mask].tolist(), right[mask].tolist()) for row, right, mask in zip(predicted, labels, told, strict=True)
    ]
    return [[names[i] for i in row] for row, _ in pairs], [[names[i] for i in right] for _, right in pairs]
