"""Sequence to sequence: texts with a target text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from numpy.random import Generator
from torch import nn
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from ...scoring.batches import IGNORED
from ..metrics import load_metric
from ..recipe.recipe import Recipe
from .answers import WRITTEN
from .columns import TEXT
from .dataset import open_data
from .evaluation import Batch, Measure, check_metric, read_tokens
from .source_model import model_loader
from .task import Task, TinyTask, with_info
from .text_examples import Texts, Tokenizing, plain, tokenizing
from .tiny_data import TEXT_CONFIG, save_tokenizer, text_feature, words

BATCH_SIZE = 8  # of measuring
_BY_TOKEN = ("accuracy", "log_likelihood")


def _row(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words and the first of them."""
    sentence = words(rng)
    return {"text": " ".join(sentence), "target": sentence[0]}


@with_info(
    keys=["character_noise", "casing", "max_length"],
    tiny=TinyTask(
        AutoModelForSeq2SeqLM,
        {"text": text_feature, "target": text_feature},
        _row,
        save_tokenizer,
        config={**TEXT_CONFIG, "decoder_start_token_id": 0},
    ),
)
def seq2seq(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Texts with a text to answer with, and a model that `AutoModelForSeq2SeqLM` loads.

    Columns: `text` and `target`. Metrics: `accuracy` (default), the share of the target's tokens that are predicted
    rightly from the text and all right tokens before them; `log_likelihood`, minus the mean loss of a token;
    `exact_match`, `exact_number`, or one of the Hub, of the text that the model writes by itself, always taking the
    likeliest token. A shift changes `text` alone.
    """
    metric = recipe.metric or "accuracy"
    check_metric(metric, *_BY_TOKEN, *WRITTEN)
    how = tokenizing(recipe)
    data = open_data(recipe, splits, {"text": TEXT, "target": TEXT})
    collate = plain(DataCollatorForSeq2Seq(how.tokenizer))
    read = partial(read_tokens, metric, 0) if metric in _BY_TOKEN else partial(_read_written, how.tokenizer)
    return Task(
        load_model=model_loader(AutoModelForSeq2SeqLM, recipe),
        splits={
            split: Texts(rows, list(range(len(rows))), partial(_read, how, data.columns), partial(how.rng, split))
            for split, rows in data.splits.items()
        },
        collate=collate,
        processor=how.tokenizer,
        metric=metric,
        measure=Measure(load_metric(metric), read, collate, BATCH_SIZE),
        summary=data.summary,
    )


def _read(how: Tokenizing, columns: dict[str, str], row: dict[str, Any], index: int, rng: Generator) -> dict[str, Any]:
    tokens = how.tokens(how.shifted(row[columns["text"]], rng))
    target = how.tokens(text=None, text_target=row[columns["target"]])
    return {**tokens, "labels": list(target["input_ids"])}


def _read_written(tokenizer: Any, model: nn.Module, batch: Batch) -> tuple[list[str], list[str]]:
    """The texts that the model generates, at most a token longer than the longest target, and the targets."""
    labels = batch.pop("labels")
    written = model.generate(  # type: ignore[operator]
        **batch, max_new_tokens=labels.shape[1] + 1, do_sample=False, num_beams=1
    )
    targets = labels.masked_fill(labels == IGNORED, tokenizer.pad_token_id)
    texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (written, targets))
    predicted, wanted = ([text.strip() for text in side] for side in texts)
    return predicted, wanted
