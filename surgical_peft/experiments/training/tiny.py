"""`--tiny`: a recipe whose model and data lie on the Hub, tried out without either.

The model is made from a config, with random weights; the data are made up, with the columns that the recipe names.
All else is the recipe's own: task, blocks, policy, and the code that reads, trains and saves.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from huggingface_hub.errors import StrictDataclassError
from numpy.random import Generator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from ...atomic_files import check_replaceable, whole_folder
from ...errors import SurgicalError, reason_of
from ...policies.stages import Stages
from ...validation import nearest
from ..recipe.recipe import Recipe
from ..tasks import SPLITS

STEPS = 2
BATCHES = 4  # of the training split; a criterion judges on some what it trained on others
MEASURED = 12  # rows of each other split
NOTICE = (
    "Tiny: random weights and generated data, a few steps. It shows that the recipe runs; its numbers mean nothing."
)
SPECIAL = ("<pad>", "</s>", "<unk>")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PEOPLE = {"Ada": "B-PER", "Lovelace": "I-PER", "Berlin": "B-LOC", "Bay": "I-LOC"}
TAGS = ("O", *PEOPLE.values())
_EXAMPLE = "tiny: {model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"
_MODEL, _DATA = "tiny-random-model", "tiny-generated-data"  # as a card of such a training calls them


def make_tiny(recipe: Recipe, output: str | Path | None = None) -> Recipe:
    """The recipe with a small random model and generated data, for two steps, or as many as its stages need.

    Args:
        recipe: its `tiny` says what model: `model_type` and sizes, as the config of transformers has them. With as
            many layers as the real model it has the same blocks.
        output: folder for the results; default is the recipe's. Model, data and results go to `tiny/` in it, so that
            no result of the real recipe is replaced.

    Raises:
        SurgicalError: the recipe says no model, one that there is not or that is not for its task, or has a task of
            the user's own; or something else lies where the results go.

    Example:
        >>> train(make_tiny(load_recipe("recipes/hub/vit_base_beans.yaml")))["after"].keys()
        dict_keys(['validation', 'test'])
    """
    if not recipe.tiny:
        raise SurgicalError(f"the recipe has no tiny model: write the config of one into it, such as {_EXAMPLE}.")
    if recipe.task not in _TASKS:
        raise SurgicalError(f"tiny: there are no generated data for the task {recipe.task!r}, only for {_known()}.")
    folder = Path(str(output if output is not None else recipe.arguments().output_dir)) / "tiny"
    model_folder, data_folder = folder / _MODEL, folder / _DATA
    check_replaceable(model_folder, "config.json")
    check_replaceable(data_folder, "train.parquet")
    kind, classes = _TASKS[recipe.task], _classes(recipe)
    config = _config(recipe, classes)
    with whole_folder(model_folder, "config.json") as temporary:
        _write_model(temporary, kind, config, recipe)
    with whole_folder(data_folder, "train.parquet") as temporary:
        _write_data(temporary, kind, recipe, classes)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (recipe.max_length, positions) if limit is not None]
    policy = recipe.make_policy()
    epochs, steps = policy.last_turn() if isinstance(policy, Stages) else (0, 0)
    enough = max(STEPS, epochs * BATCHES + 1, steps + 1)
    quiet = {"push_to_hub": False, "report_to": "none", "save_strategy": "no"}
    return replace(
        recipe,
        model=str(model_folder.resolve()),
        data=str(data_folder.resolve()),
        max_length=None if recipe.max_length is None else min(limits),
        sources=None,
        draws=None,
        test_data=None,
        source_data=None,
        training={
            **recipe.training,
            **quiet,
            "max_steps": enough,
            "output_dir": str(folder),
        },
    )


def _config(recipe: Recipe, classes: list[str]) -> Any:
    given = dict(recipe.tiny)
    kind = given.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise SurgicalError(
            f"tiny={recipe.tiny}: the model_type {kind!r} is unknown to transformers: "
            f"{nearest(str(kind), CONFIG_MAPPING)}Write it as in {_EXAMPLE}."
        )
    known = {*CONFIG_MAPPING[kind]().to_dict(), *CONFIG_MAPPING[kind].attribute_map}
    own: dict[str, Any] = {"id2label": dict(enumerate(_labels(recipe, classes)))} if classes else {}
    if recipe.task != "image_classification":
        own |= {"vocab_size": len(SPECIAL) + len(_CHARACTERS), "pad_token_id": 0, "eos_token_id": 1}
    if recipe.task == "seq2seq":
        own["decoder_start_token_id"] = 0
    for key in given:
        if key in own:
            raise SurgicalError(f"tiny={recipe.tiny}: {key} follows from the generated data: leave it out.")
        if key not in known:
            raise SurgicalError(
                f"tiny={recipe.tiny}: the config of {kind} has no {key!r}: {nearest(str(key), known)}It has: "
                f"{', '.join(sorted(known))}."
            )
    try:
        return CONFIG_MAPPING[kind](**given, **own)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise SurgicalError(f"tiny={recipe.tiny}: transformers does not take it: {error}") from error


def _classes(recipe: Recipe) -> list[str]:
    """Names for the classes of the generated data, so many and such that the recipe's `label_map` and so on fit."""
    if recipe.task == "token_classification":
        return list(TAGS)
    if "label" not in _TASKS[recipe.task].features:
        return []
    label_map = recipe.label_map
    named = [*(label_map if isinstance(label_map, Mapping) else []), *recipe.imbalance]
    names = list(dict.fromkeys(each for each in named if isinstance(each, str)))
    count = len(label_map) if isinstance(label_map, list) else 3
    count = max([count, *(each + 1 for each in named if isinstance(each, int))])
    return names + [f"class {number}" for number in range(len(names), count)]


def _labels(recipe: Recipe, classes: list[str]) -> list[str]:
    """Names for the labels of the model: those of the classes, and more where the recipe's `label_map` goes on."""
    label_map = recipe.label_map
    given = label_map.values() if isinstance(label_map, Mapping) else label_map or []
    count = max([len(classes), *(each + 1 for each in given if isinstance(each, int))])
    return classes + [f"label {number}" for number in range(len(classes), count)]


def _write_model(folder: Path, kind: _Kind, config: Any, recipe: Recipe) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind.auto.from_config(config)
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise SurgicalError(
            f"tiny={recipe.tiny}: no model for {recipe.task} can be made of it: {reason_of(error)}"
        ) from error
    model.save_pretrained(folder)
    if recipe.task == "image_classification":
        size, middle = getattr(config, "image_size", 32), [0.5] * getattr(config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        sizes = {"height": height, "width": width}
        ViTImageProcessorPil(size=sizes, image_mean=middle, image_std=middle).save_pretrained(folder)
    else:
        _tokenizer().save_pretrained(folder)


_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " "


def _tokenizer() -> PreTrainedTokenizerFast:
    """One that takes each character for a token, so that no shift of a text makes it unreadable."""
    known = {token: number for number, token in enumerate((*SPECIAL, *_CHARACTERS))}
    pad, end, unknown = SPECIAL
    inner = Tokenizer(models.WordLevel(known, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, known[end])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, eos_token=end, unk_token=unknown)


def _write_data(folder: Path, kind: _Kind, recipe: Recipe, classes: list[str]) -> None:
    features = Features({str(recipe.columns.get(role, role)): make(classes) for role, make in kind.features.items()})
    sizes = [BATCHES * recipe.arguments().train_batch_size, MEASURED, MEASURED]
    for number, (split, size) in enumerate(zip(SPLITS, sizes, strict=True)):
        rng = np.random.default_rng(number)
        rows = [kind.row(place, rng, classes) for place in range(size)]
        named = [{str(recipe.columns.get(role, role)): value for role, value in row.items()} for row in rows]
        Dataset.from_list(named, features=features).to_parquet(folder / f"{split}.parquet")


def _image(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """An image whose brightness tells its class."""
    label = place % len(classes)
    middle = 40 + 175 * label / max(1, len(classes) - 1)
    return {"image": np.clip(rng.normal(middle, 25, (32, 32, 3)), 0, 255).astype(np.uint8), "label": label}


def _text(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words, one of which is the name of their class."""
    label = place % len(classes)
    words = _words(rng)
    words[rng.integers(len(words))] = classes[label]
    return {"text": " ".join(words), "label": label}


def _tagged(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words, some of them names."""
    names = list(PEOPLE)[:2] if place % 2 else list(PEOPLE)[2:]
    tokens = [*_words(rng), *names]
    return {"tokens": tokens, "tags": [classes.index(PEOPLE.get(token, "O")) for token in tokens]}


def _counting(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words that follow each other in one order."""
    first = int(rng.integers(len(WORDS)))
    return {"text": " ".join((*WORDS, *WORDS)[first : first + 6])}


def _answered(place: int, rng: Generator, classes: list[str]) -> dict[str, Any]:
    """Words and the first of them."""
    words = _words(rng)
    return {"text": " ".join(words), "target": words[0]}


def _words(rng: Generator) -> list[str]:
    return [str(word) for word in rng.choice(WORDS, size=rng.integers(3, 7))]


@dataclass(frozen=True)
class _Kind:
    """What a task needs.

    Attributes:
        auto: the Auto class of transformers that makes its models.
        features: for each role of a column its type, made of the names of the classes.
        row: makes a row of its place, randomness and the classes.
    """

    auto: Any
    features: dict[str, Callable[[list[str]], Any]]
    row: Callable[[int, Generator, list[str]], dict[str, Any]]


def _string(classes: list[str]) -> Any:
    return Value("string")


def _label(classes: list[str]) -> Any:
    return ClassLabel(names=classes)


_TASKS = {
    "image_classification": _Kind(
        AutoModelForImageClassification, {"image": lambda _: Image(), "label": _label}, _image
    ),
    "text_classification": _Kind(AutoModelForSequenceClassification, {"text": _string, "label": _label}, _text),
    "token_classification": _Kind(
        AutoModelForTokenClassification,
        {"tokens": lambda _: List(Value("string")), "tags": lambda classes: List(ClassLabel(names=classes))},
        _tagged,
    ),
    "causal_lm": _Kind(AutoModelForCausalLM, {"text": _string}, _counting),
    "seq2seq": _Kind(AutoModelForSeq2SeqLM, {"text": _string, "target": _string}, _answered),
}


def _known() -> str:
    return ", ".join(_TASKS)
