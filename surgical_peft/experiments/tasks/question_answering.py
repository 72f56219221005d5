"""Questions about a text, answered by a part of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import LargeList, List, Value
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForQuestionAnswering

from ...errors import SurgicalError
from ...scoring.batches import IGNORED
from ..metrics import load_metric
from ..recipe.recipe import Recipe
from .cells import Fault, cells_of
from .columns import TEXT, ColumnType
from .dataset import open_data
from .evaluation import Batch, Measure, check_metric
from .source_model import model_loader
from .summary import DataSummary, listed
from .task import Task, TinyTask, with_info
from .text_examples import Texts, Tokenizing, tokenizing
from .tiny_data import TEXT_CONFIG, WORDS, save_tokenizer, text_feature

BATCH_SIZE = 32  # of measuring
LONGEST = 30  # tokens of an answer, as in the examples of transformers
METRICS = ("squad_f1", "squad_exact_match")
POSITIONS = ("start_positions", "end_positions")
_NO_TEXT = (-1, -1)  # the offsets of a token that is none of the context
_APART = ("offsets", "texts")  # of an example, for measuring it alone


def is_answers(feature: Any) -> bool:
    """Texts and their places as SQuAD has them: `{text: [...], answer_start: [...]}`, or a list of such pairs."""
    is_list = isinstance(feature, List | LargeList)
    entries = feature.feature if is_list else feature
    if not isinstance(entries, dict):
        return False
    parts = entries if is_list else {key: getattr(lists, "feature", None) for key, lists in entries.items()}
    place = parts.get("answer_start")
    return TEXT.fits(parts.get("text")) and isinstance(place, Value) and place.dtype.startswith(("int", "uint"))


def _answer_faults(rows: Any, column: str) -> list[Fault]:
    """Questions without an answer."""
    cells = cells_of(rows, column).combine_chunks()
    texts = pc.struct_field(cells, "text") if pa.types.is_struct(cells.type) else cells
    silent = np.flatnonzero(np.asarray(pc.fill_null(pc.equal(pc.list_value_length(texts), 0), True)))
    return [Fault("question{s} without an answer", silent)] if len(silent) else []


ANSWERS = ColumnType(
    "answers, {text: [...], answer_start: [...]} with the places in characters", is_answers, _answer_faults
)


def _row(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words; the question is one of them, and the answer the word that follows it."""
    context = [str(word) for word in rng.choice(WORDS, size=5, replace=False)]
    at = int(rng.integers(4))
    answers = {"text": [context[at + 1]], "answer_start": [len(" ".join(context[: at + 1])) + 1]}
    return {"question": context[at], "context": " ".join(context), "answers": answers}


@with_info(
    keys=["new_head", "character_noise", "casing", "max_length"],
    pipeline="question-answering",
    tiny=TinyTask(
        AutoModelForQuestionAnswering,
        {
            "question": text_feature,
            "context": text_feature,
            "answers": lambda classes: {"text": List(Value("string")), "answer_start": List(Value("int32"))},
        },
        _row,
        save_tokenizer,
        config=TEXT_CONFIG,
    ),
)
def question_answering(recipe: Recipe, splits: Sequence[str]) -> Task:
    """Questions answered by a part of a text, and a model that `AutoModelForQuestionAnswering` loads.

    Columns: `question`, `context` and `answers` as SQuAD has them, `{text: [...], answer_start: [...]}`; the first one
    is learned, and each counts as right. Metrics: `squad_f1` (default) and `squad_exact_match`. The context is cut off
    at `max_length`; an answer beyond it, or none, is an error, or its row is left out with `drop_empty`. A shift
    changes the question.
    """
    metric = recipe.metric or METRICS[0]
    check_metric(metric, *METRICS)
    how = tokenizing(recipe)
    if not how.tokenizer.is_fast:
        raise SurgicalError(
            f"{recipe.model}: its tokenizer does not say which part of a text a token is of: it must be a fast one."
        )
    data = open_data(recipe, splits, {"question": TEXT, "context": TEXT, "answers": ANSWERS})
    examples, left_out = {}, []
    for split, rows in data.splits.items():
        texts = Texts(rows, list(range(len(rows))), partial(_read, how, data.columns), partial(how.rng, split))
        faults = _faults(how, data.columns, texts)
        lines = [
            f"split {split}: {len(places):,} of {len(rows):,} {fault}, row {listed(places)}"
            for fault, places in faults.items()
        ]
        kept = sorted(set(texts.rows).difference(*faults.values()))
        if lines and not (recipe.drop_empty and kept):
            raise SurgicalError(f"{recipe.data}, {'; '.join(lines)}: mend these rows, or write drop_empty: true.")
        left_out += lines
        examples[split] = replace(texts, rows=kept)
    return Task(
        load_model=model_loader(AutoModelForQuestionAnswering, recipe, 2),
        splits=dict(examples),
        collate=_Collate(how.tokenizer),
        processor=how.tokenizer,
        metric=metric,
        measure=Measure(load_metric(metric), _read_answers, _Collate(how.tokenizer, is_measured=True), BATCH_SIZE),
        summary=data.summary + DataSummary(tuple(f"left out by drop_empty: {line}" for line in left_out)),
    )


def _answers(cell: Any) -> list[tuple[str, int]]:
    """The texts of the answers in a cell, and where each begins."""
    if isinstance(cell, Mapping):
        return list(zip(cell["text"], cell["answer_start"], strict=False))
    return [(answer["text"], answer["answer_start"]) for answer in cell]


def _faults(how: Tokenizing, columns: Mapping[str, str], examples: Texts) -> dict[str, list[int]]:
    """The rows that cannot be learned, by what is wrong with them."""
    misplaced, cut = [], []
    for place in range(len(examples)):
        row = examples.data[place]
        context, answers = row[columns["context"]], _answers(row[columns["answers"]])
        if not all(text and start >= 0 and context.startswith(text, start) for text, start in answers):
            misplaced.append(place)
        elif examples[place]["start_positions"] == IGNORED:
            cut.append(place)
    faults = {
        "rows have an answer that does not stand in the context where answer_start says": misplaced,
        f"rows have no answer within {how.max_length} tokens": cut,
    }
    return {fault: places for fault, places in faults.items() if places}


def _read(
    how: Tokenizing, columns: Mapping[str, str], row: dict[str, Any], index: int, rng: Generator
) -> dict[str, Any]:
    """The tokens of question and context, the places of the first answer, and what it takes to measure an answer.

    All of it in numbers, as examples are kept and sent: texts are the bytes of their JSON. An answer that is cut off
    has the place `IGNORED`.
    """
    context, answers = row[columns["context"]], _answers(row[columns["answers"]])
    tokens = how.tokenizer(
        how.shifted(row[columns["question"]], rng),
        context,
        truncation=how.max_length is not None,  # of the longer one
        max_length=how.max_length,
        return_offsets_mapping=True,
        return_token_type_ids=getattr(how.config, "type_vocab_size", 0) > 1,
    )
    pairs = zip(tokens.pop("offset_mapping"), tokens.sequence_ids(), strict=True)
    offsets = [pair if part == 1 else _NO_TEXT for pair, part in pairs]
    first, last = _place(offsets, answers[0][1], answers[0][1] + len(answers[0][0]))
    texts = json.dumps([context, *(text for text, _ in answers)])
    return {
        **tokens,
        "start_positions": first,
        "end_positions": last,
        "offsets": offsets,
        "texts": list(texts.encode()),
    }


def _place(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """The first and the last token of a part of the context; `IGNORED` where not all of it is there.

    Example:
        >>> _place([(-1, -1), (0, 3), (4, 8), (9, 12)], 4, 12)
        (2, 3)
    """
    inside = [place for place, (low, high) in enumerate(offsets) if low < end and high > start and low >= 0]
    if not inside or offsets[inside[-1]][1] < end:
        return IGNORED, IGNORED
    return inside[0], inside[-1]


@dataclass(frozen=True)
class _Collate:
    """Makes a batch, padded to the longest; what is for measuring alone is in it only if `is_measured`."""

    tokenizer: Any
    is_measured: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [name for name in examples[0] if name not in (*POSITIONS, *_APART)]
        columns = {name: [example[name] for example in examples] for name in inputs}
        batch = dict(self.tokenizer.pad(columns, padding_side="right", return_tensors="pt"))
        batch |= {name: torch.tensor([example[name] for example in examples]) for name in POSITIONS}
        if self.is_measured:
            for name, padding in zip(_APART, (_NO_TEXT[0], 0), strict=True):
                rows = [torch.tensor(example[name]) for example in examples]
                batch[name] = pad_sequence(rows, batch_first=True, padding_value=padding)
        return batch


def _read_answers(model: nn.Module, batch: Batch) -> tuple[list[str], list[list[str]]]:
    """The likeliest part of each context, of `LONGEST` tokens at most, and the right answers."""
    offsets, texts = batch.pop("offsets"), batch.pop("texts")
    output = model(**{name: value for name, value in batch.items() if name not in POSITIONS})
    outside = offsets[..., 0] < 0
    starts, ends = (
        logits.float().masked_fill(outside, -torch.inf) for logits in (output.start_logits, output.end_logits)
    )
    size = starts.shape[1]
    is_part = torch.ones(size, size, dtype=torch.bool, device=starts.device).triu().tril(LONGEST - 1)
    scores = (starts[:, :, None] + ends[:, None, :]).masked_fill(~is_part, -torch.inf)
    best = scores.flatten(1).argmax(1)
    answers, references = [], []
    for row, place in enumerate(best.tolist()):
        context, *known = json.loads(bytes(texts[row].tolist()).rstrip(b"\0"))
        first, last = divmod(place, size)
        answers.append(context[int(offsets[row, first, 0]) : int(offsets[row, last, 1])])
        references.append(known)
    return answers, references
