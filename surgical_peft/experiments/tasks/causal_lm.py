"""Texts to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from numpy.random import Generator
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from ..metrics import load_metric
from ..recipe.recipe import Recipe
from .columns import find_columns, is_text, open_splits
from .evaluation import Measure, check_metric, read_tokens
from .source_model import model_loader
from .task import Task, check_keys
from .text_examples import Texts, Tokenizing, plain, refuse_empty, tokenizing

BATCH_SIZE = 8  # of measuring; the logits of a batch have as many columns as the vocabulary has words


def causal_lm(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Texts, and a model that `AutoModelForCausalLM` loads; each text is one example and all of it is learned.

    Column: `text`. Metrics: `accuracy` (default), the share of tokens that are predicted rightly from all before them;
    `log_likelihood`, minus the mean loss of a token.
    """
    check_keys(recipe, "character_noise", "casing", "max_length")
    metric = recipe.metric or "accuracy"
    check_metric(metric, "accuracy", "log_likelihood")
    how = tokenizing(recipe)
    data = open_splits(recipe.data, splits)
    column = find_columns(recipe, data, {"text": is_text})["text"]
    refuse_empty(data, column, recipe.data)
    collate = plain(DataCollatorForSeq2Seq(how.tokenizer))  # unlike that for language models it pads labels as such
    return Task(
        load_model=model_loader(AutoModelForCausalLM, recipe),
        splits={
            split: Texts(each, list(range(len(each))), partial(_read, how, column), partial(how.rng, split))
            for split, each in data.items()
        },
        collate=collate,
        metric=metric,
        measure=Measure(load_metric(metric), partial(read_tokens, metric, 1), collate, BATCH_SIZE),
    )


def _read(how: Tokenizing, column: str, row: dict[str, Any], index: int, rng: Generator) -> dict[str, Any]:
    tokens = how.tokens(how.shifted(row[column], rng))
    return {**tokens, "labels": list(tokens["input_ids"])}
