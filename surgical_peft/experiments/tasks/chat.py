"""Chats and prompts with an answer: tokens of which only the answers are learned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import LargeList, List
from jinja2 import TemplateError
from numpy.random import Generator

from ...errors import SurgicalError
from ...scoring.batches import IGNORED
from .cells import Fault, cells_of, empty_cells
from .columns import TEXT, ColumnType
from .text_examples import Texts, Tokenizing

Message = Mapping[str, str]
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # of a template that says what the assistant has written


def _is_chat(feature: Any) -> bool:
    return (
        isinstance(feature, List | LargeList)
        and isinstance(feature.feature, dict)
        and all(TEXT.fits(feature.feature.get(key)) for key in ("role", "content"))
    )


def chat_faults(rows: Any, column: str) -> list[Fault]:
    """Chats that are missing, or in which the assistant says nothing."""
    cells = cells_of(rows, column).combine_chunks()
    if not isinstance(cells, pa.ListArray | pa.LargeListArray):
        return empty_cells(rows, column)
    messages = pc.list_flatten(cells)
    is_answer = pc.and_(
        pc.equal(pc.struct_field(messages, "role"), "assistant"),
        pc.greater(pc.utf8_length(pc.fill_null(pc.struct_field(messages, "content"), "")), 0),
    )
    answered = np.asarray(pc.list_parent_indices(cells).filter(is_answer))
    silent = np.setdiff1d(np.arange(len(cells)), answered)
    return [Fault("chat{s} without an answer of the assistant", silent)] if len(silent) else []


CHAT = ColumnType("chats: lists of messages, with role and content as text", _is_chat, chat_faults)
FORMS: tuple[Mapping[str, ColumnType], ...] = (
    {"text": TEXT},
    {"messages": CHAT},
    {"prompt": TEXT, "completion": TEXT},
)


def form_of(columns: Mapping[str, Any], features: Mapping[str, Any]) -> Mapping[str, ColumnType]:
    """The roles of a language model's columns: those that the recipe names, else those of the data's own names.

    Args:
        columns: the recipe's.
        features: of the data.
    """
    for names in (columns, features):
        for form in FORMS:
            if set(form) & set(names) if names is columns else set(form) <= set(names):
                return form
    return FORMS[1] if any(map(_is_chat, features.values())) else FORMS[0]


def unused_forms(named: Mapping[str, Any], columns: Mapping[str, str], features: Mapping[str, Any]) -> tuple[str, ...]:
    """What data say that could be learned too and is not, in a line; none where the recipe names columns.

    Args:
        named: the columns that the recipe names.
        columns: those that are used.
        features: of the data.
    """
    others = [" and ".join(form) for form in FORMS if set(form) <= set(features) and set(form) != set(columns)]
    if named or not others:
        return ()
    return (f"learned: {' and '.join(columns)}; the data have {', '.join(others)} too: name in columns what to learn",)


def read_chat(how: Tokenizing, messages: Sequence[Message], rng: Generator) -> dict[str, Any]:
    """The tokens of a chat, with labels for what the assistant says; a shift changes what others say.

    A template that marks the assistant's words with `{% generation %}` says which tokens these are; else they are
    those that come after the tokens of all before.

    Raises:
        SurgicalError: the tokenizer has no chat template, or one that does not take these messages, or that writes
            what comes before an answer in another way once it is there.
    """
    chat = [{**message, "content": message["content"] or ""} for message in messages]
    for message in chat:
        if message["role"] != "assistant":
            message["content"] = how.shifted(message["content"], rng)
    if _MARKS_ANSWERS.search(str(how.tokenizer.chat_template)):
        tokens = _render(how, chat, return_assistant_tokens_mask=True)
        ids, mask = tokens["input_ids"], tokens["assistant_masks"]
        return _cut(how, ids, [token if is_said else IGNORED for token, is_said in zip(ids, mask, strict=True)])
    ids = _render(how, chat)["input_ids"]
    labels = [IGNORED] * len(ids)
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        before = _render(how, chat[:turn], add_generation_prompt=True)["input_ids"]
        after = _render(how, chat[: turn + 1])["input_ids"]
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise SurgicalError(
                "the chat template of the tokenizer writes the beginning of a chat in another way once it goes on, so "
                "that its answers cannot be told: mark them in the template with {% generation %}, or give prompt and "
                "completion."
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return _cut(how, ids, labels)


def read_prompt(how: Tokenizing, prompt: str, completion: str, rng: Generator) -> dict[str, Any]:
    """The tokens of a prompt and its completion, of which only the completion is learned; a shift changes the prompt.

    They are tokenized apart, as the prompt will be when the model is asked; the text ends with the end of a text.
    """
    tokenizer = how.tokenizer
    first, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (how.shifted(prompt, rng), completion)
    )
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    first = [tokenizer.bos_token_id] * begins + first
    answer = answer + [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
    return _cut(how, first + answer, [IGNORED] * len(first) + answer)


def rows_without_answer(examples: Texts) -> list[int]:
    """The rows of which nothing is learned, since the answer is beyond what a model reads; each is made once."""
    return [row for index, row in enumerate(examples.rows) if set(examples[index]["labels"]) <= {IGNORED}]


def _render(how: Tokenizing, messages: Sequence[Message], **kwargs: Any) -> Any:
    if how.tokenizer.chat_template is None:
        raise SurgicalError(
            "the tokenizer has no chat_template, so it cannot write chats: take the model's instruct version, save "
            "the tokenizer with one, or give prompt and completion."
        )
    try:
        return how.tokenizer.apply_chat_template(messages, return_dict=True, **kwargs)
    except (TemplateError, ValueError) as error:
        raise SurgicalError(f"the chat template of the tokenizer does not take the messages: {error}") from error


def _cut(how: Tokenizing, ids: list[int], labels: list[int]) -> dict[str, Any]:
    ids, labels = ids[: how.max_length], labels[: how.max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
