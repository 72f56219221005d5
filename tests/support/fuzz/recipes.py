"""Recipes: any text, and any value for each key; what is accepted reads back the same and means something."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hypothesis import strategies as st
from transformers import TrainingArguments

from surgical_peft import policies, procedures
from surgical_peft.experiments.compare import methods
from surgical_peft.experiments.recipe import Recipe, load_recipe, recipe_of
from surgical_peft.experiments.recipe.recipe import NOT_KEYS

from .outcomes import Family
from .values import is_of, odd, values_of

HINTS = {entry.name: get_type_hints(Recipe)[entry.name] for entry in fields(Recipe) if entry.name not in NOT_KEYS}
TRAINING = {
    entry.name: get_type_hints(TrainingArguments)[entry.name] for entry in fields(TrainingArguments) if entry.init
}
_MOST_SEEDS = 2**32

# What a number, or each number of a list, has to be for a training to make sense, whatever the library says of it.
MEANING: dict[str, Callable[[float], bool]] = {
    "max_length": lambda value: value >= 1,
    "severity": lambda value: value in (1, 2, 3, 4, 5),
    "character_noise": lambda value: 0 <= value <= 100,
    "casing": lambda value: 0 <= value <= 100,
    "shift_seed": lambda value: 0 <= value < _MOST_SEEDS,
    "class_weights": lambda value: 0 <= value < math.inf,
    "num_blocks": lambda value: value >= 1,
    "num_batches": lambda value: 1 <= value < 2**31,
    "early_stopping_patience": lambda value: 1 <= value < 2**31,
    "rates": lambda value: 0 < value < math.inf,
    "seeds": lambda value: 0 <= value < _MOST_SEEDS,
    "rate_seeds": lambda value: 1 <= value < 2**31,
    **dict.fromkeys(("folds", "copies"), lambda value: 2 <= value < 2**31),
    **dict.fromkeys(("max_new_tokens", "test_metrics"), lambda value: 1 <= value < 2**31),
    **dict.fromkeys(("learning_rate", "num_train_epochs"), lambda value: 0 < value < math.inf),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps"), lambda value: 0 <= value < math.inf),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), lambda value: 1 <= value < 2**31),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit"), lambda value: value >= 1),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), lambda value: 0 <= value < 1),
    **dict.fromkeys(("seed", "data_seed"), lambda value: 0 <= value < _MOST_SEEDS),
    **dict.fromkeys(("save_steps", "eval_steps", "logging_steps"), lambda value: value > 0),
}
BASE = {"model": "m", "data": "d", "blocks": [0]}
_PAIRED = {  # keys that are of no use alone
    "policy_options": [{"policy": name} for name in policies.__all__],
    "procedure_options": [{"procedure": name} for name in procedures.__all__],
    "criterion_options": [{"criterion": "random"}, {"criterion": "probe"}],
    "pruner_options": [{"pruner": "MedianPruner"}, {"pruner": "HyperbandPruner"}],
}


@st.composite
def _keys(draw: st.DrawFn) -> dict[str, Any]:
    known = {**HINTS, **TRAINING}
    keys: dict[str, Any] = dict(BASE)
    for key in draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=2)):
        keys |= draw(st.sampled_from(_PAIRED.get(key, [{}])))
        keys[key] = draw(values_of(known[key]) | odd)
    if "methods" in keys and draw(st.booleans()):
        keys["methods"] = [{draw(st.sampled_from(methods.__all__)): draw(st.dictionaries(st.text(max_size=8), odd))}]
    return keys


def check_keys(keys: dict[str, Any], folder: Path) -> None:
    """Read a recipe from its keys; what is accepted has the types and the meaning that its keys ask for."""
    recipe = recipe_of(keys, folder / "recipe.yaml")
    _check_recipe(recipe, keys)


def _check_recipe(recipe: Recipe, keys: Mapping[str, Any]) -> None:
    assert recipe_of(recipe.keys()).keys() == recipe.keys(), "it reads back otherwise"
    arguments = recipe.arguments()
    for key, value in keys.items():
        kept = getattr(recipe, key) if key in HINTS else recipe.training[key]
        assert kept == value or key in ("model", "data", "metric", "methods"), f"{key} became {kept!r}"
        assert is_of({**HINTS, **TRAINING}[key], value) or key in TRAINING, f"{key} is of another type"
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                assert math.isfinite(number), f"{key} is not finite"
                assert MEANING.get(key, lambda _: True)(number), f"{key} means nothing"
        if key in TRAINING and isinstance(value, int | float) and not isinstance(value, bool):
            assert getattr(arguments, key) == value, f"{key} arrives as {getattr(arguments, key)!r}"
    config = recipe.config()
    assert recipe.blocks == config.blocks or isinstance(recipe.target_modules, dict), "the blocks are others"


_LINES = [
    *("a: 1", "- 1", "model: m", "data: [d", "x: &a [1, 2]", "y: *a", "z: *nowhere", "!!python/object:os.system x"),
    *("? [1, 2]\n: 3", "learning_rate: 1e-3", "seed: 007", "d: 2020-13-45", "n: !!int abc", "n: 0x" + "f" * 5000),
    *("%YAML 9.9", "---", "...", "\tblocks: 3", "blocks: [0]", "model: [m", "b: !!binary ab", "on: off", "<<: {a: 1}"),
    *("blocks: " + "[" * 400 + "]" * 400, "a: &a [" + "x, " * 5000 + "]", "s: |\n  text", "k: " + "9" * 5000),
]
_USUAL = [
    *(
        "learning_rate: 1e-3",
        "seed: 007",
        "rates: [1e-3, 2, 0.5]",
        "label_map: [1, null, 0]",
        "splits: {validation: test}",
    ),
    *(
        "columns: {text: body}",
        "num_train_epochs: 2.5",
        "metric: macro_f1",
        "new_head: yes",
        "policy: layer_decay",
        "folds: 3",
    ),
    *(
        "target_modules: [attention]",
        "weight_decay: 1_0.5",
        "optim: sgd",
        "max_steps: 0x10",
        "imbalance: {0: 0.5, a: .5}",
    ),
    *(
        "methods: [full, {lora: {rank: 2}}]",
        "class_weights: balanced",
        "task: >-\n  text_classification",
        "severity: 3",
    ),
]
_BOMB = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])
_CIRCLE = "a: &a [*a]\n"


@st.composite
def _texts(draw: st.DrawFn) -> str:
    usual = draw(st.integers(0, 2)) > 0
    lines = draw(st.lists(st.sampled_from(_USUAL), max_size=4))
    lines += (
        [] if usual else draw(st.lists(st.sampled_from([*_LINES, _BOMB, _CIRCLE]) | st.text(max_size=20), max_size=2))
    )
    if usual or draw(st.booleans()):
        lines[:0] = ["model: m", "data: d", "blocks: [0]"]
    text = "\n".join(lines)
    if draw(st.integers(0, 2)) == 0 and text:
        place = draw(st.integers(0, len(text) - 1))
        text = (
            text[:place]
            + draw(st.sampled_from(["", ":", "\0", "&a ", "*a", "]", "\ufeff", "'", "\x85"]))
            + text[place + 1 :]
        )
    return text


def _with_numbers(value: Any) -> Any:
    """What PyYAML has read, with `1e-3` as a number, which is text in YAML 1.1."""
    if isinstance(value, dict):
        return {key: _with_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return list(map(_with_numbers, value))
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value


def check_text(text: str, folder: Path) -> None:
    """Read a recipe from a file; what is accepted holds what PyYAML reads, number for number."""
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    recipe = load_recipe(path)
    keys = yaml.safe_load(text)
    assert keys.keys() == recipe.given.keys(), "it has other keys"
    for key, (written, _) in recipe.given.items():
        assert written == _with_numbers(keys[key]), f"{key} is another value"
    _check_recipe(recipe, {key: written for key, (written, _) in recipe.given.items()})


FAMILIES = [Family("recipes, values of keys", _keys(), check_keys), Family("recipes, text", _texts(), check_text)]
