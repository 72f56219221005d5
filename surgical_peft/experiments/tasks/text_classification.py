"""Texts with class labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from numpy.random import Generator
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from ..recipe.recipe import Recipe
from .columns import find_columns, is_label, is_text, open_splits
from .evaluation import classification
from .labels import label_rows
from .source_model import model_loader
from .task import Task, check_keys
from .text_examples import Texts, Tokenizing, plain, refuse_empty, tokenizing

BATCH_SIZE = 64  # of measuring


def text_classification(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Texts with class labels, and a model that `AutoModelForSequenceClassification` loads.

    Columns: `text` and `label`. Metrics: `accuracy` (default), `macro_f1`, `matthews_correlation`.
    """
    check_keys(recipe, "label_map", "imbalance", "new_head", "character_noise", "casing", "max_length")
    how = tokenizing(recipe)
    collate = plain(DataCollatorWithPadding(how.tokenizer))
    measure = classification(recipe.metric or "accuracy", collate=collate, batch_size=BATCH_SIZE)
    data = open_splits(recipe.data, splits)
    columns = find_columns(recipe, data, {"text": is_text, "label": is_label})
    refuse_empty(data, columns["text"], recipe.data)
    found = label_rows(recipe, data, columns["label"], how.config)
    return Task(
        load_model=partial(
            _load,
            model_loader(AutoModelForSequenceClassification, recipe, found.count, found.names),
            how.tokenizer.pad_token_id,
        ),
        splits={
            split: Texts(
                each,
                found.rows[split],
                partial(_read, how, columns["text"], found.labels[split]),
                partial(how.rng, split),
            )
            for split, each in data.items()
        },
        collate=collate,
        metric=recipe.metric or "accuracy",
        measure=measure,
    )


def _load(load: Any, pad_token_id: int) -> nn.Module:
    model = load()
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = pad_token_id  # by which a decoder finds the last token of a text
    return model


def _read(
    how: Tokenizing, column: str, labels: list[int], row: dict[str, Any], index: int, rng: Generator
) -> dict[str, Any]:
    return {**how.tokens(how.shifted(row[column], rng)), "labels": labels[index]}
