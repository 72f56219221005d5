"""Adapters side by side on every family: switched, disabled, merged, unloaded and deleted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.tuner.tensors.slots import BASE
from tests.support.toys import Toy
from tests.support.wrapping import (
    adapted,
    base_logits,
    layers,
    logits,
    no_warnings,
    nudge,
    same,
    trainable,
    weights,
    wrap,
)

# disabling, merging, unloading


def test_disabling_gives_the_base_model_exactly(family: Toy) -> None:
    """In a context and outside one, nested, after an error, and with the adapter merged."""
    model, batch = nudge(wrap(family)), family.batch()
    model.add_adapter("second", SurgicalConfig(blocks=[family.first]))
    tuned, names = logits(model, batch), trainable(model)

    def assert_tuned() -> None:
        assert same(logits(model, batch), tuned)
        assert trainable(model) == names

    def assert_base() -> None:
        assert same(logits(model, batch), base_logits(family))
        assert trainable(model) == []

    with model.disable_adapter():
        with pytest.raises(KeyError, match="inside"), model.disable_adapter():
            assert_base()
            raise KeyError("inside")
        assert_base()
        model.set_adapter("second")  # shows when it is enabled again
        model.set_adapter("default")
        assert same(logits(model, batch), base_logits(family))
    assert_tuned()

    model.base_model.disable_adapter_layers()
    assert_base()
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert_tuned()

    model.merge_adapter()
    with model.disable_adapter():
        assert_base()
    assert_tuned()
    assert model.get_model_status().merged_adapters == []


def test_in_16_bits_every_state_has_its_own_numbers(family: Toy) -> None:
    base = family.model().half()
    before = {name: tensor.detach().clone() for name, tensor in base.named_parameters()}  # a tied one once
    model = nudge(get_peft_model(base, SurgicalConfig(blocks=[family.first, family.last])))
    model.add_adapter("second", SurgicalConfig(blocks=[family.first]))
    tuned = {name: tensor.detach().clone() for name, tensor in adapted(model).items()}

    def stands(expected: dict[str, Tensor]) -> bool:
        state = base.state_dict()
        return all(
            torch.equal(state[name], tensor) and tensor.dtype == state[name].dtype for name, tensor in expected.items()
        )

    assert stands(before | tuned)
    with model.disable_adapter():
        assert stands(before)
    model.set_adapter("second")
    assert stands(before)
    model.set_adapter("default")
    model.merge_adapter()
    assert stands(before | tuned)
    model.unmerge_adapter()
    assert stands(before | tuned)
    model.unload()
    assert stands(before)


def test_merging_and_unmerging_are_exact(family: Toy) -> None:
    model, batch = nudge(wrap(family)), family.batch()
    tuned = logits(model, batch)
    state = copy.deepcopy(model.state_dict())

    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    assert same(logits(model, batch), tuned)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert same(logits(model, batch), tuned)
    model.unmerge_adapter()
    assert same(logits(model, batch), tuned)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()

    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("safe_merge", [False, True], ids=["float32", "bfloat16-safe"])
def test_merge_and_unload_gives_the_original_class_with_the_tuned_bits(family: Toy, safe_merge: bool) -> None:
    base = family.model().to(torch.bfloat16 if safe_merge else torch.float32)
    types = [type(module) for module in base.modules()]
    state = {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}
    model = nudge(get_peft_model(base, SurgicalConfig(blocks=[family.first, family.last])))
    tuned = {name: parameter.detach().clone() for name, parameter in adapted(model).items()}
    if safe_merge:
        model.merge_adapter()

    merged = model.merge_and_unload(safe_merge=safe_merge)

    assert [type(module) for module in merged.modules()] == types
    assert list(merged.state_dict()) == list(state)
    for name, parameter in merged.named_parameters():
        assert parameter.dtype == state[name].dtype
        assert torch.equal(parameter, tuned.get(name, state[name]))
    assert not all(torch.equal(merged.get_parameter(name), state[name]) for name in tuned)


def test_a_merged_model_can_be_wrapped_again(family: Toy) -> None:
    model = nudge(wrap(family))
    expected = logits(model, family.batch())
    merged = model.merge_and_unload()
    assert same(logits(merged, family.batch()), expected)
    with no_warnings():
        again = get_peft_model(merged, SurgicalConfig(blocks=[family.last]))
    assert same(logits(again, family.batch()), expected)
    assert trainable(again) == trainable(wrap(family, blocks=[family.last]))


def test_adapters_on_different_blocks_merge_and_on_overlapping_ones_do_not(family: Toy) -> None:
    model, batch = nudge(wrap(family, blocks=[family.first])), family.batch()
    model.add_adapter("second", SurgicalConfig(blocks=[family.last]))
    model.add_adapter("third", SurgicalConfig(blocks=[family.first, family.last]))
    for seed, name in enumerate(("second", "third"), 1):
        model.set_adapter(name)
        nudge(model, seed)
    third = logits(model, batch)
    model.base_model.set_adapter(["default", "second"])
    both, tuned = logits(model, batch), adapted(model)

    with pytest.raises(SurgicalError, match="merge"):
        model.merge_adapter(["default", "third"])
    assert model.get_model_status().merged_adapters == []
    assert same(logits(model, batch), both)
    model.set_adapter("third")
    assert same(logits(model, batch), third)

    model.merge_adapter(["default", "second"])
    assert same(logits(model, batch), both)
    merged = dict(model.merge_and_unload(adapter_names=["default", "second"]).named_parameters())
    assert all(torch.equal(merged[name], tensor) for name, tensor in tuned.items())


# several adapters


def test_switching_moves_no_weight_and_sets_requires_grad(family: Toy) -> None:
    model = nudge(wrap(family, blocks=[family.first]))
    model.add_adapter("second", SurgicalConfig(blocks=[family.first, family.last]))
    model.set_adapter("second")
    of = {"second": trainable(model), "none": []}
    model.set_adapter("default")
    of["default"] = trainable(model)
    assert of["default"] and set(of["default"]) < set(of["second"])

    def tensors() -> dict[tuple[int, str, str], Tensor]:
        return {
            (number, name, key): tensor
            for number, layer in enumerate(layers(model))
            for name in (BASE, *layer.adapters)
            for key, tensor in layer.tensors(name).items()
        }

    before = tensors()
    values = {key: tensor.detach().clone() for key, tensor in before.items()}
    for switch, expected in (
        (lambda: model.set_adapter("second"), "second"),
        (model.merge_adapter, "second"),
        (model.unmerge_adapter, "second"),
        (model.base_model.disable_adapter_layers, "none"),
        (model.base_model.enable_adapter_layers, "second"),
        (lambda: model.set_adapter("default", inference_mode=True), "none"),
        (lambda: model.set_requires_grad("default"), "default"),
        (lambda: model.set_requires_grad("default", requires_grad=False), "none"),
        (lambda: model.set_adapter("default"), "default"),
        (model.train, "default"),
        (model.eval, "default"),
    ):
        switch()
        assert trainable(model) == of[expected]
        assert all(tensor is before[key] and torch.equal(tensor, values[key]) for key, tensor in tensors().items())
    model.delete_adapter("default")
    assert trainable(model) == of["second"]


def test_an_unknown_adapter_is_not_switched_to_and_an_unknown_or_merged_one_not_deleted(family: Toy) -> None:
    model = nudge(wrap(family))
    expected, names = logits(model, family.batch()), trainable(model)
    for verb in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match="nope"):
            verb("nope")
    assert model.active_adapter == "default"
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    assert same(logits(model, family.batch()), expected)
    assert trainable(model) == names


def test_adapters_on_different_blocks_switch(family: Toy) -> None:
    model, batch = wrap(family, blocks=[family.first]), family.batch()
    model.add_adapter("second", SurgicalConfig(blocks=[family.last]))
    first_names = trainable(model)
    nudge(model)
    first = logits(model, batch)

    model.set_adapter("second")
    second_names = trainable(model)
    assert same(logits(model, batch), base_logits(family))
    nudge(model, seed=1)
    second = logits(model, batch)
    assert first_names and second_names and not set(first_names) & set(second_names)

    model.set_adapter("default")
    assert trainable(model) == first_names
    assert same(logits(model, batch), first)
    model.set_adapter("second", inference_mode=True)
    assert trainable(model) == []
    assert same(logits(model, batch), second)

    model.base_model.set_adapter(["default", "second"])  # PEFT allows several, here they do not meet
    assert set(trainable(model)) == {*first_names, *second_names}


def test_adapters_on_the_same_block_switch(family: Toy) -> None:
    model, batch = nudge(wrap(family, blocks=[family.first])), family.batch()
    first, first_names = logits(model, batch), trainable(model)
    model.add_adapter("second", SurgicalConfig(blocks=[family.first]))
    assert trainable(model) == first_names
    assert same(logits(model, batch), first)

    model.set_adapter("second")
    assert same(logits(model, batch), base_logits(family))  # starts from the base, not from the first
    assert trainable(model) == first_names
    model.set_adapter("default")
    assert same(logits(model, batch), first)
    with pytest.raises(SurgicalError, match="active"):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SurgicalError, match="merge one"):
        model.merge_adapter(["default", "second"])
    assert same(logits(model, batch), first)


def test_each_of_two_adapters_saves_its_own_file(family: Toy, tmp_path: Path) -> None:
    model, batch = nudge(wrap(family, blocks=[family.first])), family.batch()
    first = logits(model, batch)
    model.add_adapter("second", SurgicalConfig(blocks=[family.first, family.last]))
    model.set_adapter("second")
    nudge(model, seed=1)
    second = logits(model, batch)

    model.save_pretrained(tmp_path)

    for directory, expected in ((tmp_path, first), (tmp_path / "second", second)):
        loaded = PeftModel.from_pretrained(family.model(), directory)
        assert same(logits(loaded, batch), expected)
        assert set(weights(directory)) <= {f"base_model.model.{name}" for name in family.model().state_dict()}


def test_deleting_an_adapter_leaves_the_others_and_in_the_end_the_base_model(family: Toy) -> None:
    """Layers without the deleted adapter went on naming it, and the model was left with no adapter it knew of."""
    alone = next(block for block in reversed(family.blocks) if block not in (family.first, family.last))
    model, batch = nudge(wrap(family, blocks=[family.first, alone])), family.batch()
    first, names = logits(model, batch), trainable(model)
    model.add_adapter("second", SurgicalConfig(blocks=[family.first, family.last]))
    model.delete_adapter("second")  # which is not active
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert not any("second" in layer.adapters for layer in layers(model))
    assert not any("second" in name for name in model.state_dict())
    assert same(logits(model, batch), first)
    assert trainable(model) == names

    model.add_adapter("second", SurgicalConfig(blocks=[family.first, family.last]))
    model.set_adapter("second")
    second, names = logits(nudge(model, seed=1), batch), trainable(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapter == "second" and model.active_adapters == ["second"]
    assert model.get_model_status().active_adapters == ["second"]
    assert same(logits(model, batch), second)
    assert trainable(model) == names

    model.delete_adapter("second")
    base = model.base_model.model  # PEFT lets the PeftModel itself run no more, whatever the method
    assert same(logits(base, batch), base_logits(family))
    assert trainable(model) == []
