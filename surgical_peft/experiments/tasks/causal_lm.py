"""Language modeling: texts to continue."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import List, Value
from numpy.random import Generator
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from ...errors import SurgicalError
from ..metrics import load_metric
from ..recipe.recipe import Recipe
from .answers import MAX_NEW_TOKENS, WRITTEN, Answers
from .chat import form_of, read_chat, read_prompt, rows_without_answer, unused_forms
from .dataset import open_data
from .evaluation import Measure, check_metric, read_tokens
from .source_model import model_loader
from .summary import DataSummary, listed
from .task import Task, TinyTask, with_info
from .text_examples import Texts, Tokenizing, plain, tokenizing
from .tiny_data import TEXT_CONFIG, WORDS, save_tokenizer, text_feature

BATCH_SIZE = 8  # of measuring; the logits of a batch have as many columns as the vocabulary has words
BATCH_WRITTEN = 32  # of writing, which keeps the logits of one place alone


def _row(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words that follow each other in one order; of a chat or a prompt the answer is the last one."""
    first = int(rng.integers(len(WORDS)))
    words = (*WORDS, *WORDS)[first : first + 6]
    prompt, completion = " ".join(words[:2]), words[2]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return {"text": " ".join(words), "messages": messages, "prompt": prompt, "completion": completion}


def _roles(recipe: Recipe) -> Collection[str]:
    """The roles of the columns that a recipe names or, for metrics of what is written, needs; else a text."""
    is_asked = {recipe.metric, *recipe.test_metrics} & set(WRITTEN)
    return form_of(recipe.columns, dict.fromkeys(("prompt", "completion")) if is_asked else {})


@with_info(
    keys=["character_noise", "casing", "max_length", "max_new_tokens"],
    pipeline="text-generation",
    tiny=TinyTask(
        AutoModelForCausalLM,
        {
            **dict.fromkeys(("text", "prompt", "completion"), text_feature),
            "messages": lambda classes: List({"role": Value("string"), "content": Value("string")}),
        },
        _row,
        save_tokenizer,
        config=TEXT_CONFIG,
        roles=_roles,
    ),
)
def causal_lm(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Texts, chats or prompts with completions, and a model that `AutoModelForCausalLM` loads; each is one example.

    Columns: `text`, all of which is learned; or `messages`, a list of `{role, content}` for the tokenizer's chat
    template; or `prompt` and `completion`. Of chats and prompts only the answers are learned and
    measured. Metrics: `accuracy` (default), the share of tokens that are predicted rightly from all before them;
    `log_likelihood`, minus the mean loss of a token; `exact_number` and `exact_match`, of the last answers that the
    model writes by itself, always its likeliest token: for these, `max_length` cuts off training examples alone.
    """
    metric = recipe.metric or "accuracy"
    check_metric(metric, "accuracy", "log_likelihood", *WRITTEN)
    is_written = metric in WRITTEN
    if recipe.max_new_tokens is not None and not {metric, *recipe.test_metrics} & set(WRITTEN):
        raise SurgicalError(
            f"max_new_tokens={recipe.max_new_tokens} is for metrics of what the model writes: {', '.join(WRITTEN)}."
        )
    how = tokenizing(recipe)
    data = open_data(recipe, splits, partial(form_of, recipe.columns))
    whole = Answers(replace(how, max_length=how.limit), metric, recipe.max_new_tokens or MAX_NEW_TOKENS)
    collate = plain(DataCollatorForSeq2Seq(how.tokenizer))  # unlike that for language models it pads labels as such
    features: Any = next((rows.features for rows in data.splits.values()), {})  # no split may be asked for
    unused = unused_forms(recipe.columns, data.columns, features)
    examples, lines = {}, []
    for split, rows in data.splits.items():
        is_whole = is_written and split != "train"
        made_by = partial(_read, whole.how if is_whole else how, data.columns)
        texts = Texts(rows, list(range(len(rows))), made_by, partial(how.rng, split))
        examples[split] = texts
        if is_whole:
            whole.check(split, texts)
        elif "text" not in data.columns and (unanswered := rows_without_answer(texts)):
            lines.append(
                f"split {split}: {len(unanswered):,} of {len(rows):,} rows have no answer within {how.max_length} "
                f"tokens, row {listed(unanswered)}"
            )
            kept = sorted(set(texts.rows) - set(unanswered))
            if not recipe.drop_empty or not kept:
                raise SurgicalError(f"{recipe.data}, {lines[-1]}: raise max_length, or write drop_empty: true.")
            examples[split] = replace(texts, rows=kept)
    measure = Measure(load_metric(metric), partial(read_tokens, metric, 1), collate, BATCH_SIZE)
    if is_written:
        measure = Measure(load_metric(metric), whole.read, collate, BATCH_WRITTEN, whole.max_new_tokens)
    return Task(
        load_model=model_loader(AutoModelForCausalLM, recipe),
        splits=dict(examples),
        collate=collate,
        processor=how.tokenizer,
        metric=metric,
        measure=measure,
        summary=data.summary + DataSummary((*unused, *(f"left out by drop_empty: {line}" for line in lines))),
    )


def _read(how: Tokenizing, columns: dict[str, str], row: dict[str, Any], index: int, rng: Generator) -> dict[str, Any]:
    if "messages" in columns:
        return read_chat(how, row[columns["messages"]], rng)
    if "prompt" in columns:
        return read_prompt(how, row[columns["prompt"]], row[columns["completion"]], rng)
    tokens = how.tokens(how.shifted(row[columns["text"]], rng))
    return {**tokens, "labels": list(tokens["input_ids"])}
