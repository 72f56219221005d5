"""Answers that a language model writes by itself, from the prompt or the chat before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...errors import SurgicalError
from ...scoring.batches import IGNORED
from ..metrics import load_metric
from .evaluation import Batch
from .summary import listed
from .task import Examples
from .text_examples import Tokenizing

WRITTEN = ("exact_match", "exact_number")  # metrics of such answers
MAX_NEW_TOKENS = 256  # as in EleutherAI's lm-evaluation-harness
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # whatever the model's
_GREEDY |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True}  # generation config says


def split_answer(ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens before the last answer of an example, and those of the answer: the last stretch with labels.

    Example:
        >>> split_answer([5, 6, 7, 8, 9], [-100, 6, -100, 8, 9])
        ([5, 6, 7], [8, 9])
    """
    end = next((place for place in range(len(labels), 0, -1) if labels[place - 1] != IGNORED), 0)
    start = next((place for place in range(end, 0, -1) if labels[place - 1] == IGNORED), 0)
    return list(ids[:start]), list(labels[start:end])


@dataclass(frozen=True)
class Answers:
    """The last answers of chats and prompts, as a model writes them: always its likeliest token.

    Attributes:
        how: makes the examples, in full length.
        metric: that they are for.
        max_new_tokens: of an answer; it ends before where the model ends it, or takes no more tokens.
    """

    how: Tokenizing
    metric: str
    max_new_tokens: int

    def read(self, model: nn.Module, batch: Batch) -> tuple[list[str], list[str]]:
        """The answers that a causal language model writes for a batch of examples, and the right ones."""
        tokenizer = self.how.tokenizer
        rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
        parts = [split_answer(ids[is_told].tolist(), labels[is_told].tolist()) for ids, labels, is_told in rows]
        prompts = {"input_ids": [prompt for prompt, _ in parts]}
        padded = tokenizer.pad(prompts, padding_side="left", return_attention_mask=True, return_tensors="pt")
        padded = {name: padded[name].to(batch["input_ids"].device) for name in ("input_ids", "attention_mask")}
        width = padded["input_ids"].shape[1]
        room = self.max_new_tokens
        if self.how.max_length is not None:
            room = min(room, self.how.max_length - width)
        ids = model.generate(  # type: ignore[operator]
            **padded,
            **_GREEDY,
            max_new_tokens=room,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self._ends(model),
        )
        return self._texts(ids[:, width:].tolist()), self._texts([answer for _, answer in parts])

    def _ends(self, model: Any) -> list[int]:
        """The tokens that end a text: those of the model, and that with which a right answer ends."""
        known = model.generation_config.eos_token_id
        ends = {*(known if isinstance(known, list) else [known]), self.how.tokenizer.eos_token_id}
        return sorted(end for end in ends if end is not None)

    def _texts(self, answers: list[list[int]]) -> list[str]:
        return [text.strip() for text in self.how.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def check(self, split: str, examples: Examples) -> None:
        """Make sure that a model could write each right answer, and that it would count as right.

        Raises:
            SurgicalError: examples without a prompt, with too long an answer, or with one that is not even equal to
                itself, as a text without a number is for `exact_number`.
        """
        items = [examples[index] for index in range(len(examples))]
        parts = [split_answer(item["input_ids"], item["labels"]) for item in items]
        limit, longest = self.max_new_tokens, max((len(answer) for _, answer in parts), default=0)

        def refuse(wrong: list[bool], fault: str) -> None:
            if rows := [row for row, is_wrong in enumerate(wrong) if is_wrong]:
                raise SurgicalError(
                    f"metric {self.metric!r} is of answers that a model writes: in split {split}, {len(rows):,} of "
                    f"{len(items):,} examples have {fault}: example {listed(rows)}."
                )

        refuse(
            [len(item["input_ids"]) == self.how.max_length for item in items],
            f"{self.how.max_length} tokens or more, which the model does not take; leave them out",
        )
        refuse([not prompt for prompt, _ in parts], "no prompt; give prompt and completion, or messages")
        refuse(
            [len(answer) > limit for _, answer in parts],
            f"answers of more than max_new_tokens={limit} tokens; raise it to {longest}",
        )
        texts, metric = self._texts([answer for _, answer in parts]), load_metric(self.metric)
        if texts and metric(texts, texts) != 1:
            refuse(
                [metric([text], [text]) != 1 for text in texts], "answers that are never right; take another metric"
            )
