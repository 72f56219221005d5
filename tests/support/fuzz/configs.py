"""Arguments of `SurgicalConfig`: what is accepted tunes just the weights that it names, and comes back from disk."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig
from tests.support.toys import TOYS
from tests.support.wrapping import nudge

from .outcomes import Family
from .values import odd

RECORDS = (
    "selection",
    "tuned_modules",
    "fingerprint",
    "frozen_fingerprint",
    "new_weights",
    "head_config",
    "read_from",
)
KEYS = [entry.name for entry in fields(SurgicalConfig) if entry.init]
LORA = [entry.name for entry in fields(LoraConfig) if entry.init]
BERT = TOYS["bert"]

usual_blocks = st.sampled_from(
    [0, -1, "0:2", "head", "all", "embeddings", [0, "head"], [1, 2], [-1], ["embeddings", "1"]]
)
blocks = st.one_of(
    usual_blocks,
    st.sampled_from(
        [0, -1, "0:2", ":", "-2:", "head", "all", "embeddings", "3", "-4", "0:0", "::-1", "auto", "1 ", "٣"]
    ),
    st.lists(st.sampled_from([0, 1, 2, -1, "0", "head", "0:2", "embeddings", 3, True]), max_size=3),
    st.sampled_from([np.array([0, 1]), np.array(0), (0, 1), {0}, range(2), [np.int64(1)], torch.tensor([0]), b"0"]),
    odd,
)
usual_choices = st.one_of(
    st.lists(
        st.sampled_from(["attention", "query", "output.dense", "LayerNorm"]), min_size=1, max_size=2, unique=True
    ),
    st.sampled_from(["all", "all-norm", "all-bias", ".*query", r"bert\.encoder\.layer\.\d\.output", r".*(key|value)"]),
)
choices = st.one_of(
    st.lists(
        st.sampled_from(["attention", "query", "output.dense", "LayerNorm", "classifier", "nowhere"]), max_size=2
    ),
    st.sampled_from(
        ["all", "all-linear", "all-norm", "all-bias", ".*query", r"bert\.encoder\.layer\.\d\.output", "("]
    ),
    odd,
)
targets = choices | st.dictionaries(st.sampled_from(["0", "1", "head", "-1", "9", "embeddings"]), choices, max_size=3)
loras = st.fixed_dictionaries({"target_modules": choices}) | st.dictionaries(st.sampled_from(LORA), odd, max_size=2)
special = {"blocks": blocks, "target_modules": targets, "exclude_modules": choices, "modules_to_save": choices}
special |= {"lora": loras | odd, "keep_base": st.sampled_from(["device", "cpu", "none", "disk"])}


@st.composite
def _arguments(draw: st.DrawFn) -> dict[str, Any]:
    if draw(st.integers(0, 2)):
        given = {
            "blocks": draw(usual_blocks),
            "target_modules": draw(usual_choices),
            "exclude_modules": draw(usual_choices),
        }
        given |= {"keep_base": draw(st.sampled_from(["device", "cpu", "none"])), "frozen_eval": draw(st.booleans())}
        given |= {"lora": {"r": draw(st.integers(1, 3)), "target_modules": draw(usual_choices)}}
        left_out = draw(st.lists(st.sampled_from(list(given)), unique=True, max_size=5))
        return {key: value for key, value in given.items() if key not in left_out}
    chosen = draw(st.lists(st.sampled_from([*special, *KEYS]), max_size=2, unique=True))
    given = {"blocks": draw(blocks)} if draw(st.booleans()) else {}
    if "lora" in chosen and draw(st.booleans()):
        given = {"blocks": [2], "lora": {"r": 2, **draw(loras)}}
        chosen.remove("lora")
    return given | {key: draw(special.get(key, odd)) for key in chosen}


def check_arguments(given: dict[str, Any], folder: Path) -> None:
    """Make a config, wrap a model by it, save and load: the weights that train are those that the config names."""
    before = copy.deepcopy(given)
    config = SurgicalConfig(**given)
    model: Any = BERT.model()
    names = {name for name, _ in model.named_parameters()}
    asked = copy.deepcopy(config)
    wrapped = get_peft_model(model, config)
    expected = _named(BERT.model(), asked)
    assert repr(before) == repr(given), "the arguments were changed"
    trained = {name.removeprefix("base_model.model.") for name, p in wrapped.named_parameters() if p.requires_grad}
    saved = {name.replace("modules_to_save.default.", "") for name in trained if ".lora_" not in name}
    assert expected is None or saved == expected, f"trains {sorted(saved ^ expected)[:3]} otherwise"
    assert saved <= names and (saved or config.lora), "trains what is not there, or nothing"
    assert bool(config.lora) == any(".lora_" in name for name in trained), "LoRA is not where it was asked for"
    nudge(wrapped).save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(BERT.model(), folder / "adapter")
    ours, theirs = wrapped.state_dict(), loaded.state_dict()
    differing = [n for n, t in theirs.items() if "surgical_" not in n and not torch.equal(t, ours[n])]
    assert not differing, f"{differing[:2]} came back otherwise"


def _named(model: nn.Module, config: SurgicalConfig) -> set[str] | None:
    """The parameters that a config names, from its words alone; None where it takes PEFT to say it."""
    if config.modules_to_save or config.task_type is not None or config.layers is not None:
        return None
    block_map = BlockMap.find(model)
    excluded, choice = config.exclude_modules, config.target_modules
    chosen: dict[str | None, Any] = {None: choice}
    if isinstance(choice, dict):
        chosen = {name: part for key, part in choice.items() for name in block_map.parse(key)}
    elif config.blocks is not None:
        chosen = dict.fromkeys(block_map.parse(config.blocks), choice or "all")
    named = set()
    for name, _ in model.named_parameters():
        block = block_map.block_of(name)
        wanted = chosen.get(block, chosen.get(None))
        if wanted == "all-linear":
            return None
        if wanted and _is_in(model, wanted, name) and not (excluded and _is_in(model, excluded, name)):
            named.add(name)
    return named


def _is_in(model: nn.Module, choice: Any, name: str) -> bool:
    parts = name.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts))]
    if choice == "all":
        return True
    if choice == "all-bias":
        return parts[-1].endswith("bias")
    if choice == "all-norm":
        return "norm" in type(model.get_submodule(paths[-1])).__name__.lower()
    if isinstance(choice, str):
        return any(re.fullmatch(choice, path) for path in paths)
    return any(path == word or path.endswith(f".{word}") for path in paths for word in choice)


@functools.cache
def hints() -> dict[str, Any]:
    """The types of the arguments."""
    return get_type_hints(SurgicalConfig)


FAMILIES = [Family("SurgicalConfig, arguments", _arguments(), check_arguments)]
