"""PEFT's functions for the base model's state dict, and transformers' own verb that deletes an adapter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import save_and_load
from torch import Tensor

from surgical_peft import SurgicalConfig, SurgicalError
from tests.support.families import FAMILIES
from tests.support.plain import PLAIN
from tests.support.toys import TOYS, Toy
from tests.support.wrapping import layers, logits, nudge, same

REPOSITORY = Path(__file__).parents[2]
EVERY = TOYS | FAMILIES | PLAIN


def get_base(model: PeftModel) -> dict[str, Tensor]:
    return save_and_load.get_base_model_state_dict(model)


def set_base(model: PeftModel, state_dict: dict[str, Tensor], **kwargs: Any) -> Any:
    return save_and_load.set_base_model_state_dict(model, state_dict, **kwargs)


NAMES = ["bert", "llama_tied", "resnet", "levit", "lone"]


@pytest.fixture(params=NAMES)
def anyone(request: pytest.FixtureRequest) -> Toy:
    return EVERY[request.param]


def tuned(family: Toy, **kwargs: Any) -> PeftModel:
    return nudge(get_peft_model(family.model(), SurgicalConfig(blocks=[family.first, family.last], **kwargs)))


def with_second(family: Toy, **kwargs: Any) -> PeftModel:
    model = tuned(family, **kwargs)
    model.add_adapter("second", SurgicalConfig(blocks=[family.last], **kwargs))
    model.set_adapter("second")
    return nudge(model, seed=1)


def merged(family: Toy, **kwargs: Any) -> PeftModel:
    model = with_second(family, **kwargs)
    model.merge_adapter(["default"])
    return model


def disabled(family: Toy, **kwargs: Any) -> PeftModel:
    model = with_second(family, **kwargs)
    model.base_model.disable_adapter_layers()
    return model


STATES = {each.__name__: each for each in (tuned, with_second, merged, disabled)}
KEPT = [(state, "device", name) for state in STATES for name in NAMES]
KEPT += [(state, "cpu", name) for state in STATES for name in ("llama_tied", "lone")]


def equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("state", "keep_base", "name"), KEPT)
def test_it_is_the_bases_whatever_stands(state: str, keep_base: str, name: str) -> None:
    anyone = EVERY[name]
    expected = anyone.model().state_dict()
    model = STATES[state](anyone, keep_base=keep_base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answer = logits(model, anyone.batch())
    standing = [slot.standing for layer in layers(model) for slot in layer.slots.values()]
    assert equal(get_base(model), expected)
    assert standing == [slot.standing for layer in layers(model) for slot in layer.slots.values()]
    assert equal(model.state_dict(), before)
    assert same(logits(model, anyone.batch()), answer)
    assert anyone.model().load_state_dict(get_base(model))  # strictly


@pytest.mark.parametrize(("state", "keep_base", "name"), KEPT)
def test_setting_it_changes_the_base_and_no_adapter(state: str, keep_base: str, name: str) -> None:
    anyone = EVERY[name]
    model = STATES[state](anyone, keep_base=keep_base)
    sets = {
        (number, adapter, attribute): tensor.detach().clone()
        for number, layer in enumerate(layers(model))
        for adapter in layer.adapters
        for attribute, tensor in layer.tensors(adapter).items()
    }
    other = anyone.model(seed=7)
    result = set_base(model, other.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert equal(get_base(model), other.state_dict())
    for (number, adapter, attribute), values in sets.items():
        assert torch.equal(layers(model)[number].tensors(adapter)[attribute], values), (adapter, attribute)
    model.base_model.enable_adapter_layers()
    if state == "merged":
        model.unmerge_adapter()
    with model.disable_adapter():
        assert same(logits(model, anyone.batch()), logits(other, anyone.batch()))
    unloaded = model.unload()
    assert same(logits(unloaded, anyone.batch()), logits(other, anyone.batch()))


def test_lora_beside_is_left_out() -> None:
    for name in ("bert", "llama"):
        family = TOYS[name]
        model = get_peft_model(
            family.model(),
            SurgicalConfig(blocks=[family.last], lora=LoraConfig(target_modules=r".*\.0\..*(query|q_proj)")),
        )
        assert equal(get_base(nudge(model)), family.model().state_dict())


def test_a_state_dict_that_lacks_a_key_is_refused_and_one_that_is_not_strict_is_not(anyone: Toy) -> None:
    model, other = tuned(anyone), anyone.model(seed=7).state_dict()
    name = next(iter(other))
    rest = {key: value for key, value in other.items() if key != name}
    if anyone.name != "llama_tied":  # whose other end has the values
        with pytest.raises((RuntimeError, ValueError)):
            set_base(model, rest)
    set_base(model, rest, strict=False)
    found = get_base(model)
    assert all(torch.equal(found[key], value) for key, value in rest.items())


@pytest.mark.parametrize("way", [get_base, lambda model: set_base(model, {})])
def test_without_a_base_it_says_so(anyone: Toy, way: Callable[[PeftModel], Any]) -> None:
    model = tuned(anyone, keep_base="none")
    before, answer = model.state_dict(), logits(model, anyone.batch())
    with pytest.raises(SurgicalError):
        way(model)
    assert equal(model.state_dict(), before) and same(logits(model, anyone.batch()), answer)


def test_models_of_other_methods_are_as_ever() -> None:
    for name in ("bert", "llama"):
        config = LoraConfig(target_modules=["query", "q_proj"])
        model = nudge(get_peft_model(TOYS[name].model(), config))
        assert equal(get_base(model), TOYS[name].model().state_dict())
        other = TOYS[name].model(seed=7)
        set_base(model, other.state_dict())
        assert equal(get_base(model), other.state_dict())


EARLY = """
from peft import get_peft_model
from peft.utils import get_base_model_state_dict, set_base_model_state_dict
import torch
from surgical_peft import SurgicalConfig

base = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
model = get_peft_model(base, SurgicalConfig(target_modules=["1"]))
for parameter in [p for p in model.parameters() if p.requires_grad]:
    parameter.data += 1
found = get_base_model_state_dict(model)
print(all(torch.equal(found[name], start[name]) for name in start))
set_base_model_state_dict(model, {name: tensor + 2 for name, tensor in start.items()})
found = model.unload().state_dict()
print(all(torch.equal(found[name], start[name] + 2) for name in start))
"""


def test_whoever_imported_them_before_us_gets_the_base_too() -> None:
    """As a file does whose imports are sorted."""
    done = subprocess.run([sys.executable, "-c", EARLY], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]


# transformers' own verbs


NATIVE = ["bert", "llama_tied", "t5", "resnet", "levit", "whisper"]


def native(family: Toy) -> Any:
    """With two adapters, `second` on one of the first's blocks and active; the base's requires_grad is as built."""
    base: Any = family.model()
    base.add_adapter(SurgicalConfig(blocks=[family.first, family.last]))
    nudge(base)
    base.add_adapter(SurgicalConfig(blocks=[family.last]), "second")
    base.set_adapter("second")
    return nudge(base, seed=1).eval()


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_deletes_an_adapter_that_is_idle(name: str) -> None:
    family = EVERY[name]
    base = native(family)
    expected = logits(base, family.batch())
    base.delete_adapter("default")
    assert list(base.peft_config) == ["second"]
    assert {adapter for layer in layers(base) for adapter in layer.adapters} == {"second"}
    assert not any(".default." in key for key in base.state_dict())
    assert same(logits(base, family.batch()), expected)
    base.disable_adapters()
    assert same(logits(base, family.batch()), logits(family.model(), family.batch()))


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_deletes_one_after_the_other(name: str) -> None:
    family = EVERY[name]
    base = native(family)
    objects = dict(base.named_modules(remove_duplicate=False))
    base.set_adapter("default")
    expected = logits(base, family.batch())
    base.set_adapter("second")
    with pytest.warns(UserWarning):  # it is active
        base.delete_adapter("second")
    base.set_adapter("default")
    assert same(logits(base, family.batch()), expected)
    base.delete_adapter("default")
    assert not layers(base) and base.state_dict().keys() == family.model().state_dict().keys()
    assert all(objects[path] is module for path, module in base.named_modules(remove_duplicate=False))
    assert equal(base.state_dict(), family.model().state_dict())
    assert same(logits(base, family.batch()), logits(family.model(), family.batch()))
    base.add_adapter(SurgicalConfig(blocks=[family.first]))  # and again
    assert same(logits(nudge(base), family.batch()), logits(base, family.batch()))
    with pytest.raises(ValueError, match="gone"):
        base.delete_adapter("gone")


@pytest.mark.parametrize("name", NATIVE)
def test_a_loaded_adapter_is_deleted_and_loaded_again(name: str, tmp_path: Path) -> None:
    family = EVERY[name]
    model = tuned(family)
    expected = logits(model, family.batch())
    model.save_pretrained(tmp_path)
    base: Any = family.model()
    for _ in range(2):
        base.load_adapter(str(tmp_path), "loaded")
        assert same(logits(base, family.batch()), expected)
        base.delete_adapter("loaded")
        assert not layers(base) and equal(base.state_dict(), family.model().state_dict())


def test_an_adapter_of_another_method_is_deleted_as_ever() -> None:
    for name in ("bert", "llama"):
        family = TOYS[name]
        base: Any = family.model()
        base.add_adapter(LoraConfig(target_modules=["query", "q_proj"]), "lora")
        nudge(base)
        assert not same(logits(base, family.batch()), logits(family.model(), family.batch()))
        base.delete_adapter("lora")
        assert not [key for key in base.state_dict() if "lora_" in key]
        assert same(logits(base, family.batch()), logits(family.model(), family.batch()))
