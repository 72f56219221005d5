"""Text examples: the tokenizer, shifts of text, and examples that are tokenized when they are asked for."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoTokenizer

from ...errors import SurgicalError
from ..recipe.recipe import Recipe
from ..shifts import casing, character_noise
from .task import load_pretrained

TextShift = Callable[[str, Generator], str]


@dataclass(frozen=True)
class Tokenizing:
    """Turns the texts of a recipe into tokens.

    Attributes:
        tokenizer: that of the model; it always has a token to pad with.
        config: of the model.
        max_length: in tokens, or None where neither recipe nor model set a limit.
        limit: that of the model and its tokenizer, in tokens, or None where they set none.
        shift: changes a text, or None.
        seed: of the shift.
    """

    tokenizer: Any
    config: Any
    max_length: int | None
    limit: int | None
    shift: TextShift | None
    seed: int

    def shifted(self, text: str, rng: Generator) -> str:
        """The text after the recipe's shift; if that leaves nothing, as it was."""
        changed = self.shift(text, rng) if self.shift else text
        return changed if changed.strip() else text

    def rng(self, split: str, place: int) -> Generator:
        """The randomness of one row, which depends on its place, the split and the seed alone."""
        return np.random.default_rng((zlib.crc32(split.encode()), place, self.seed))

    def tokens(self, text: str | list[str] | None, **kwargs: Any) -> Any:
        """The tokens of a text, cut off at `max_length`."""
        # Token types say which of two texts a token is of; not every model that gets them by its tokenizer takes them.
        kwargs |= {"truncation": self.max_length is not None, "max_length": self.max_length}
        return self.tokenizer(text, return_token_type_ids=False, **kwargs)


def tokenizing(recipe: Recipe) -> Tokenizing:
    """The tokenizer of a recipe's model, its limits, and the recipe's shift of text.

    Raises:
        SurgicalError: no such model or tokenizer, a `max_length` that the model does not take, a rate that is no
            percentage, or `casing` for a tokenizer that does not see case.
    """
    config = load_pretrained(AutoConfig.from_pretrained, recipe, "model")
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, recipe, "tokenizer of")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise SurgicalError(f"the tokenizer of {recipe.model} has no pad_token: give it one and save it again.")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit is not None and limit < 10**9]
    if recipe.max_length is not None and not 1 <= recipe.max_length <= min(limits, default=recipe.max_length):
        raise SurgicalError(
            f"max_length={recipe.max_length} does not fit {recipe.model}, which takes 1 to "
            f"{min(limits, default='any')}."
        )
    limit = min(limits, default=None)
    longest = recipe.max_length or limit
    if longest is not None:
        tokenizer.model_max_length = longest  # saved with it, so that whoever predicts cuts off there, too
    return Tokenizing(tokenizer, config, longest, limit, _shift(recipe, tokenizer), recipe.shift_seed)


def _shift(recipe: Recipe, tokenizer: Any) -> TextShift | None:
    steps: list[TextShift] = []
    for key, change in (("character_noise", character_noise), ("casing", casing)):
        rate = getattr(recipe, key)
        if rate is not None:
            if not 0 < rate <= 100:
                raise SurgicalError(f"{key}={rate} is no percentage: more than 0, 100 at most.")
            steps.append(partial(_change, change, rate))
    normalizer = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
    if recipe.casing and normalizer and normalizer.normalize_str("A") == normalizer.normalize_str("a"):
        raise SurgicalError(
            f"casing={recipe.casing} changes nothing: the tokenizer of {recipe.model} takes upper for lower case."
        )
    return partial(_in_turn, steps) if steps else None


def _change(change: Callable[..., str], rate: float, text: str, rng: Generator) -> str:
    return change(text, rate, rng)


def _in_turn(steps: list[TextShift], text: str, rng: Generator) -> str:
    for step in steps:
        text = step(text, rng)
    return text


@dataclass(frozen=True)
class Texts(Dataset[dict[str, Any]]):
    """The rows of one split as a model takes them.

    Attributes:
        data: the split.
        rows: places of the rows that are used.
        read: makes an example of a row, its number among `rows`, and its randomness.
        rng: the randomness of a row by its place.
    """

    data: Any
    rows: list[int]
    read: Callable[[dict[str, Any], int, Generator], dict[str, Any]]
    rng: Callable[[int], Generator]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return self.read(self.data[row], index, self.rng(row))


def plain(collator: Callable[[Any], Any]) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """A collator of transformers that gives a plain dictionary."""
    return partial(_plain, collator)


def _plain(collator: Callable[[Any], Any], examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return dict(collator(examples))
