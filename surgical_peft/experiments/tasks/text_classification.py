"""Texts with class labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from numpy.random import Generator
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from ..recipe.recipe import Recipe
from .columns import TEXT
from .dataset import open_data
from .source_model import model_loader
from .targets import load_with_loss, target_of
from .task import Task, TinyTask, with_info
from .text_examples import Texts, Tokenizing, plain, tokenizing
from .tiny_data import TEXT_CONFIG, label_feature, labels_of, save_tokenizer, text_feature, words

BATCH_SIZE = 64  # of measuring


def _row(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words, one of which is the name of their class."""
    label = place % len(classes)
    sentence = words(rng)
    sentence[rng.integers(len(sentence))] = classes[label]
    return {"text": " ".join(sentence), "label": label}


@with_info(
    keys=[
        *("label_map", "imbalance", "new_head", "problem_type", "class_weights"),
        *("character_noise", "casing", "max_length"),
    ],
    pipeline="text-classification",
    tiny=TinyTask(
        AutoModelForSequenceClassification,
        {"text": text_feature, "label": label_feature},
        _row,
        save_tokenizer,
        labels_of,
        TEXT_CONFIG,
    ),
)
def text_classification(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Texts with class labels, and a model that `AutoModelForSequenceClassification` loads.

    Columns: `text` and `label`. Metrics: `accuracy` (default), `macro_f1`, `matthews_correlation`; with
    `problem_type` those of its target.
    """
    target = target_of(recipe)
    how = tokenizing(recipe)
    collate = plain(DataCollatorWithPadding(how.tokenizer))
    measure = target.measure(recipe.metric, collate=collate, batch_size=BATCH_SIZE)
    data = open_data(recipe, splits, {"text": TEXT, "label": target.column}, target.classes)
    labeled = target.label_rows(recipe, data, how.config)
    return Task(
        load_model=partial(
            _load,
            load_with_loss(
                model_loader(AutoModelForSequenceClassification, recipe, labeled.count, labeled.names),
                recipe,
                labeled.weights,
            ),
            how.tokenizer.pad_token_id,
        ),
        splits={
            split: Texts(
                rows,
                labeled.rows[split],
                partial(_read, how, data.columns["text"], labeled.labels[split]),
                partial(how.rng, split),
            )
            for split, rows in data.splits.items()
        },
        collate=collate,
        processor=how.tokenizer,
        metric=recipe.metric or target.metrics[0],
        measure=measure,
        names_labels=labeled.count > 1,
        summary=data.summary + labeled.summary,
    )


def _load(load: Any, pad_token_id: int) -> nn.Module:
    model = load()
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id  # by which a decoder finds the last token of a text
    return model


def _read(
    how: Tokenizing, column: str, labels: list[Any], row: dict[str, Any], index: int, rng: Generator
) -> dict[str, Any]:
    return {**how.tokens(how.shifted(row[column], rng)), "labels": labels[index]}
