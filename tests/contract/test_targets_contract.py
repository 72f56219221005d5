"""What every target of `emit` must show; a new function in `export/targets/` is picked up by itself.

The tools are not installed here. How each reads its settings is written again below, from its source at the commit
that the target's docstring names, and applied to the text alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from torch import nn

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.export import targets
from surgical_peft.export.emit import emit
from surgical_peft.export.targets import Choice, Emission
from tests.support.families import FAMILIES
from tests.support.vision_language import qwen2_vl

MODELS = {
    "llama": FAMILIES["llama"].build,
    "llama_tied": FAMILIES["llama_tied"].build,
    "qwen3_moe": FAMILIES["qwen3_moe"].build,
    "qwen2_vl": qwen2_vl,
}
CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"blocks": [-2, -1]}),
    ("llama", {"blocks": ["embeddings", 0, 1]}),
    ("llama", {"target_modules": {"2": ["self_attn"], "head": "all"}}),
    ("llama", {"blocks": "all"}),
    ("llama_tied", {"blocks": ["embeddings", 0]}),
    ("qwen3_moe", {"blocks": [-1]}),
    ("qwen3_moe", {"blocks": [1, 2], "target_modules": ["mlp"]}),
    ("qwen2_vl", {"blocks": ["language_model.0"]}),
    ("qwen2_vl", {"blocks": ["language_model.1", "language_model.3"]}),  # evenly strided
    ("qwen2_vl", {"blocks": ["visual.0", "visual.1"]}),
    ("qwen2_vl", {"blocks": ["language_model.embeddings", "language_model.2", "language_model.3"]}),
]
# Beyond what LLaMA-Factory can say: its `norm` is every norm, and its layers are the first or the last ones.
BEYOND: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"blocks": [1]}),
    ("llama", {"blocks": [-1, "final_norm"]}),
    ("llama", {"blocks": [0, 2], "target_modules": "all-norm"}),
    ("qwen3_moe", {"blocks": [0], "target_modules": ["experts"]}),
    ("qwen2_vl", {"blocks": ["visual.embeddings", "visual.1", "language_model.1", "language_model.final_norm"]}),
]


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def by_axolotl(text: str, model: nn.Module) -> set[str]:
    """`freeze_layers_except`, without ranges of rows."""
    patterns = yaml.safe_load(text)["unfrozen_parameters"]
    assert not any(pattern.endswith("]") for pattern in patterns)
    found = [re.compile(re.sub(r"\.(?!\+)", "\\.", pattern)) for pattern in patterns]
    return {name for name in names_of(model) for pattern in found if pattern.match(name) is not None}


def by_ms_swift(text: str, model: nn.Module) -> set[str]:
    """`prepare_model`: all are trained, `freeze_parameters`, `activate_parameters`."""
    config = yaml.safe_load(text)
    assert config["tuner_type"] == "full" and config["freeze_parameters_ratio"] == 1
    towers = ["model.visual", "model.visual.merger"]  # frozen by default, before the pattern is looked at
    state = {name: not name.startswith(tuple(towers)) for name in names_of(model)}
    state |= dict.fromkeys(state, False)
    state |= {name: True for name in state if re.compile(config["trainable_parameters_regex"]).search(name)}
    return {name for name, is_trained in state.items() if is_trained}


def by_verl(text: str, model: nn.Module) -> set[str]:
    """`apply_freeze_to_module`, on what Hydra makes of the overrides."""
    command = shlex.split(text, comments=True)
    overrides = dict(part.split("=", 1) for part in command if part.startswith("actor_rollout_ref."))
    assert command[:3] == ["python3", "-m", "verl.trainer.main_ppo"] and command[-1] == "$@"
    assert overrides["actor_rollout_ref.actor.fsdp_config.use_orig_params"] == "True"
    value = overrides["actor_rollout_ref.model.freeze_module_pattern"]
    assert "\\" not in value and "${" not in value
    return {name for name in names_of(model) if not re.search(json.loads(value), name)}


def by_unsloth(text: str, model: nn.Module) -> set[str]:
    """Full fine-tuning trains all; then the script runs."""
    model.requires_grad_(True)
    fake: Any = ModuleType("unsloth")

    def from_pretrained(name: str, *, full_finetuning: bool, load_in_4bit: bool) -> tuple[nn.Module, None]:
        assert full_finetuning and not load_in_4bit
        return model, None

    fake.FastModel = SimpleNamespace(from_pretrained=from_pretrained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "unsloth", fake)
        exec(compile(text, "train_unsloth.py", "exec"), {})
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def by_trl(text: str, model: nn.Module) -> set[str]:
    """`get_peft_model` with the script's config; what stands after `if __name__` is TRL's own example."""
    [config] = [node.value for node in ast.parse(text).body if ast.unparse(node).startswith("peft_config")]
    return trained_by(model, eval(ast.unparse(config), {"SurgicalConfig": SurgicalConfig}))


def trained_by(model: nn.Module, config: SurgicalConfig) -> set[str]:
    """What our own tuner trains, by the names of the bare model, which it is again afterwards."""
    model.requires_grad_(True)
    wrapped = get_peft_model(model, config)
    names = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    wrapped.unload()
    return {name.removeprefix("base_model.model.") for name in names}


def by_llama_factory(text: str, model: nn.Module) -> set[str]:
    """`_setup_freeze_tuning`, for Llama, Qwen3-MoE and Qwen2-VL."""
    args = yaml.safe_load(text)
    assert args["finetuning_type"] == "freeze"
    config: Any = model.config
    num_layers = getattr(config, "text_config", config).num_hidden_layers
    count = args["freeze_trainable_layers"]
    if args.get("use_llama_pro", False):
        assert num_layers % count == 0
        stride = num_layers // count
        ids = range(stride - 1, num_layers + stride - 1, stride)
    elif count > 0:
        ids = range(max(0, num_layers - count), num_layers)
    else:
        ids = range(min(-count, num_layers))
    names = names_of(model)
    hidden = {name.split(".0.")[-1].split(".")[0] for name in names if ".0." in name}
    others = {name.split(".")[-2] for name in names if re.search(r"\.\d+\.", name) is None}
    layers = []
    for module in args["freeze_trainable_modules"].split(","):
        assert module == "all" or module in hidden
        layers += [f".{index}.{module if module != 'all' else ''}" for index in ids]
    for module in (args.get("freeze_extra_modules") or "").split(","):
        assert not module or module in others
        layers += [module] * bool(module)
    forbidden: list[str] = []
    if config.model_type == "qwen2_vl":
        if not args.get("freeze_multi_modal_projector", True):
            layers.append("visual.merger")
        forbidden += ["visual.patch_embed", "visual.blocks"] * args.get("freeze_vision_tower", True)
        forbidden += ["visual.merger"] * args.get("freeze_multi_modal_projector", True)
        forbidden += ["language_model", "lm_head"] * args.get("freeze_language_model", False)
    return {n for n in names if any(key in n for key in layers) and not any(key in n for key in forbidden)}


RULES: dict[str, Callable[[str, nn.Module], set[str]]] = {name: globals()[f"by_{name}"] for name in targets.__all__}


model_of = functools.cache(lambda kind: MODELS[kind]())


def choice_of(kind: str, keys: dict[str, Any]) -> Choice:
    return Choice.of(model_of(kind), f"some/{kind}", SurgicalConfig(**keys))


def test_every_public_function_of_a_file_is_a_target() -> None:
    folder = Path(inspect.getfile(targets)).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "choice"} == set(targets.__all__)


def test_every_target_says_where_its_rule_is_from() -> None:
    for name in targets.__all__:
        source = (getattr(targets, name).__doc__ or "").partition("Source: ")[2]
        assert re.search(r"https://github\.com/\S+ at [0-9a-f]{7}", source), name


@pytest.mark.parametrize(("kind", "keys"), CHOICES, ids=str)
def test_a_choice_is_what_our_own_tuner_trains(kind: str, keys: dict[str, Any]) -> None:
    assert choice_of(kind, keys).parameters == trained_by(model_of(kind), SurgicalConfig(**keys))


@pytest.mark.parametrize("target", targets.__all__)
@pytest.mark.parametrize(("kind", "keys"), CHOICES, ids=str)
def test_the_tool_trains_exactly_the_choice(target: str, kind: str, keys: dict[str, Any]) -> None:
    choice = choice_of(kind, keys)
    text = emit(choice, target).text
    assert f"some/{kind}" in text
    assert RULES[target](text, choice.model) == choice.parameters


@pytest.mark.parametrize("target", targets.__all__)
@pytest.mark.parametrize(("kind", "keys"), BEYOND, ids=str)
def test_what_a_tool_cannot_say_is_refused_with_the_nearest(target: str, kind: str, keys: dict[str, Any]) -> None:
    choice = choice_of(kind, keys)
    if target != "llama_factory":
        assert RULES[target](emit(choice, target).text, choice.model) == choice.parameters
        return
    with pytest.raises(SurgicalError, match="freeze_trainable_layers"):
        emit(choice, target)
    nearest = targets.llama_factory(choice)
    assert nearest.trained == by_llama_factory(nearest.text, choice.model)
    assert nearest.trained & choice.parameters


@pytest.mark.parametrize("target", targets.__all__)
def test_a_model_that_writes_nothing_is_refused(target: str) -> None:
    choice = Choice.of(FAMILIES["vit"].model(), "some/vit", SurgicalConfig(blocks=[0]))
    with pytest.raises(SurgicalError, match="ViTForImageClassification"):
        emit(choice, target)


@pytest.mark.parametrize("target", targets.__all__)
def test_lora_beside_the_weights_is_written_or_refused(target: str) -> None:
    choice = choice_of("llama", {"blocks": [2], "lora": {"target_modules": ["q_proj"], "r": 2}})
    if target == "trl":
        assert any("lora_A" in name for name in by_trl(emit(choice, target).text, choice.model))
    else:
        with pytest.raises(SurgicalError, match="LoRA"):
            emit(choice, target)


@pytest.mark.parametrize("target", targets.__all__)
def test_names_of_strangers_stay_text(target: str) -> None:
    """A base model's name comes from an adapter's config, which may be anybody's."""
    evil = "base\"; import os'; touch x #\n!ruby $(touch x) `touch x`"
    choice = Choice.of(model_of("llama"), evil, SurgicalConfig(blocks=[-1]))
    text = emit(choice, target).text
    assert RULES[target](text, choice.model) == choice.parameters
    if target == "verl":
        assert any(json.dumps(evil) in part for part in shlex.split(text, comments=True))
    elif text.startswith("#") and "import" not in text.replace(json.dumps(evil), ""):
        assert evil in yaml.safe_load(text).values()
    else:
        assert evil in [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]


def everything(choice: Choice) -> Emission:
    """A target of the user's own, which takes too much."""
    return Emission("train all", "all.txt", "all: true", frozenset(choice.names))


def test_one_of_the_users_own_is_held_to_the_same() -> None:
    choice = choice_of("llama", {"blocks": [0]})
    with pytest.raises(SurgicalError, match="all: true"):
        emit(choice, everything)
    assert emit(choice_of("llama", {"blocks": "all"}), f"{__name__}:everything").text == "train all"
    with pytest.raises(SurgicalError, match="llama_factory"):
        emit(choice, "llama-factry")
