"""Made-up texts, their tokenizer and the names of classes, for the `--tiny` models and data of tasks."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Value
from numpy.random import Generator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..recipe.recipe import Recipe

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SPECIAL = ("<pad>", "</s>", "<unk>")
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "
_CHAT = (
    "{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT_CONFIG = {"vocab_size": len(_SPECIAL) + len(_CHARACTERS), "pad_token_id": 0, "eos_token_id": 1}


def text_feature(classes: list[str]) -> Any:
    """The type of a column of texts."""
    return Value("string")


def label_feature(classes: list[str]) -> Any:
    """The type of a column of classes."""
    return ClassLabel(names=classes)


def words(rng: Generator) -> list[str]:
    """Three to six words."""
    return [str(word) for word in rng.choice(WORDS, size=rng.integers(3, 7))]


def labels_of(recipe: Recipe) -> list[str]:
    """Names for the classes of the generated data, so many and such that the recipe's `label_map` and so on fit."""
    label_map = recipe.label_map
    named = [*(label_map if isinstance(label_map, Mapping) else []), *recipe.imbalance]
    names = list(dict.fromkeys(name for name in named if isinstance(name, str)))
    count = len(label_map) if isinstance(label_map, list) else 3
    count = max([count, *(number + 1 for number in named if isinstance(number, int))])
    return names + [f"class {number}" for number in range(len(names), count)]


def save_tokenizer(config: Any, folder: Path) -> None:
    """Save a tokenizer that takes each character for a token, so that no shift of a text makes it unreadable."""
    known = {token: number for number, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    pad, end, unknown = _SPECIAL
    inner = Tokenizer(models.WordLevel(known, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, known[end])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token=end, unk_token=unknown)
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(folder)
