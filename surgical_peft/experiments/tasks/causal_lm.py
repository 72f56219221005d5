"""Language modeling: texts to continue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from numpy.random import Generator
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from ..metrics import load_metric
from ..recipe.recipe import Recipe
from .columns import TEXT
from .dataset import open_data
from .evaluation import Measure, check_metric, read_tokens
from .source_model import model_loader
from .task import Task, TinyTask, with_info
from .text_examples import Texts, Tokenizing, plain, tokenizing
from .tiny_data import TEXT_CONFIG, WORDS, save_tokenizer, text_feature

BATCH_SIZE = 8  # of measuring; the logits of a batch have as many columns as the vocabulary has words


def _row(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words that follow each other in one order."""
    first = int(rng.integers(len(WORDS)))
    return {"text": " ".join((*WORDS, *WORDS)[first : first + 6])}


@with_info(
    keys=["character_noise", "casing", "max_length"],
    pipeline="text-generation",
    tiny=TinyTask(AutoModelForCausalLM, {"text": text_feature}, _row, save_tokenizer, config=TEXT_CONFIG),
)
def causal_lm(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Texts, and a model that `AutoModelForCausalLM` loads; each text is one example and all of it is learned.

    Column: `text`. Metrics: `accuracy` (default), the share of tokens that are predicted rightly from all before them;
    `log_likelihood`, minus the mean loss of a token.
    """
    metric = recipe.metric or "accuracy"
    check_metric(metric, "accuracy", "log_likelihood")
    how = tokenizing(recipe)
    data = open_data(recipe, splits, {"text": TEXT})
    collate = plain(DataCollatorForSeq2Seq(how.tokenizer))  # unlike that for language models it pads labels as such
    return Task(
        load_model=model_loader(AutoModelForCausalLM, recipe),
        splits={
            split: Texts(
                rows, list(range(len(rows))), partial(_read, how, data.columns["text"]), partial(how.rng, split)
            )
            for split, rows in data.splits.items()
        },
        collate=collate,
        metric=metric,
        measure=Measure(load_metric(metric), partial(read_tokens, metric, 1), collate, BATCH_SIZE),
        summary=data.summary,
    )


def _read(how: Tokenizing, column: str, row: dict[str, Any], index: int, rng: Generator) -> dict[str, Any]:
    tokens = how.tokens(how.shifted(row[column], rng))
    return {**tokens, "labels": list(tokens["input_ids"])}
