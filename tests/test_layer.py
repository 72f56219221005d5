from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from surgical_peft import SurgicalError
from surgical_peft.layer import SurgicalLayer


def layer_with(*adapters: str, module: nn.Module | None = None) -> SurgicalLayer:
    """A layer whose adapters differ from the original and from one another; the first is active."""
    layer = SurgicalLayer(module or nn.Linear(3, 2), adapters[0])
    for number, name in enumerate(adapters, start=1):
        layer.update_layer(name)
        with torch.no_grad():
            for parameter in layer.surgical_copies[name].parameters():
                parameter.add_(number)
    return layer


X = torch.ones(1, 3)


class Block(nn.Module):
    """Reads its own attributes as transformers' layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.attention_type = "sliding"

    def forward(self, x: torch.Tensor, *, factor: float = 1.0) -> tuple[torch.Tensor, str]:
        return self.inner(x) * self.scale * factor, self.attention_type


def test_a_fresh_layer_answers_as_the_original() -> None:
    module = Block()
    layer = SurgicalLayer(module, "default")
    assert torch.equal(layer(X, factor=2.0)[0], module(X, factor=2.0)[0])


def test_the_original_is_frozen_and_the_active_copy_trains() -> None:
    layer = layer_with("a", "b")
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "surgical_copies.a.weight",
        "surgical_copies.a.bias",
    ]


def test_attributes_come_from_the_module_in_use() -> None:
    layer = layer_with("a", module=Block())
    layer.surgical_copies["a"].attention_type = "full"
    assert layer.attention_type == "full"
    assert layer.inner is layer.surgical_copies["a"].inner
    assert layer.scale is layer.surgical_copies["a"].scale
    layer.enable_adapters(False)
    assert layer.attention_type == "sliding"
    with pytest.raises(AttributeError, match="no_such"):
        layer.no_such()
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias")


def test_weight_and_bias_are_those_in_use() -> None:
    layer = layer_with("a")
    assert layer.weight is layer.surgical_copies["a"].weight
    assert layer.bias is layer.surgical_copies["a"].bias
    layer.enable_adapters(False)
    assert layer.weight is layer.get_base_layer().weight


def test_a_layer_without_the_active_adapter_answers_with_the_original() -> None:
    layer = layer_with("a")
    layer.set_adapter("elsewhere")
    assert layer.module_in_use() is layer.original_module
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_merging_wins_over_switching_until_unmerged() -> None:
    layer = layer_with("a", "b")
    layer.merge(adapter_names=["b"])
    assert layer.module_in_use() is layer.surgical_copies["b"]
    layer.unmerge()
    assert layer.module_in_use() is layer.surgical_copies["a"]


def test_merging_twice_warns_and_stays() -> None:
    layer = layer_with("a")
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert layer.merged_adapters == ["a"]
    assert torch.equal(layer(X), layer.surgical_copies["a"](X))


def test_two_adapters_are_not_merged_or_active_at_once() -> None:
    layer = layer_with("a", "b")
    with pytest.raises(SurgicalError, match=r"\['a', 'b'\] tune the same block; merge one"):
        layer.merge(adapter_names=["a", "b"])
    layer.merge(adapter_names=["a"])
    with pytest.raises(SurgicalError, match="unmerge the other"), pytest.warns(UserWarning, match="additionally"):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a"]
    layer.unmerge()
    with pytest.raises(SurgicalError, match="cannot be active at once"):
        layer.check_set_adapter(["a", "b"])
    with pytest.raises(SurgicalError, match="cannot be active at once"):
        layer.set_adapter(["a", "b"])  # as transformers' set_adapter does, which asks nobody
    assert layer.active_adapters == ["a"]
    layer._active_adapter = ["a", "b"]
    with pytest.raises(SurgicalError, match="use one"):
        layer(X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(value: float) -> None:
    layer = layer_with("a")
    layer.surgical_copies["a"].weight.data[0, 0] = value
    with pytest.raises(SurgicalError, match="adapter a seems to be broken: weight has NaN"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    layer.merge()
    assert layer.merged


def test_disabling_unmerges_and_stops_gradients() -> None:
    layer = layer_with("a")
    layer.merge()
    layer.enable_adapters(False)
    assert not layer.merged
    assert torch.equal(layer(X), layer.original_module(X))
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer.enable_adapters(True)
    assert torch.equal(layer(X), layer.surgical_copies["a"](X))
    assert all(parameter.requires_grad for parameter in layer.surgical_copies["a"].parameters())


def test_unloading_gives_the_module_in_use_frozen() -> None:
    layer = layer_with("a")
    assert layer.unload_and_optionally_merge_module(False, False, None) is layer.original_module
    layer.merge()
    merged = layer.unload_and_optionally_merge_module(True, False, None)
    assert merged is layer.surgical_copies["a"]
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_deleting_the_active_adapter_takes_the_next() -> None:
    layer = layer_with("a", "b")
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        layer.delete_adapter("a")
    assert layer.active_adapters == ["b"]
    assert all(parameter.requires_grad for parameter in layer.surgical_copies["b"].parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.delete_adapter("a", ["b"])  # PEFT comes a second time
        layer.delete_adapter("b")
    assert layer.module_in_use() is layer.original_module


def test_state_dicts_have_the_original_names() -> None:
    layer = layer_with("a", "b", module=Block())
    state = layer.adapter_state_dict("b", layer.state_dict())
    assert list(state) == list(Block().state_dict())
    assert all(torch.equal(state[key], value) for key, value in layer.surgical_copies["b"].state_dict().items())
    load_map = layer.adapter_state_dict_load_map("b")
    assert list(load_map.keys()) == list(state)
    assert set(load_map.values()) <= set(layer.state_dict())
    assert layer.adapter_state_dict("c", layer.state_dict()) == layer.adapter_state_dict_load_map("c") == {}


def test_a_name_that_begins_like_another_is_another() -> None:
    layer = layer_with("a", "a1")
    assert list(layer.adapter_state_dict("a", layer.state_dict())) == ["weight", "bias"]


def test_a_copy_moves_to_device_and_dtype_of_its_original() -> None:
    layer = layer_with("a", module=Block().bfloat16())
    layer.surgical_copies["a"].float()
    layer._move_adapter_to_device_of_base_layer("a")
    layer._move_adapter_to_device_of_base_layer("unknown")
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert layer.surgical_copies["a"].count.dtype == torch.bfloat16


def test_the_copy_has_its_own_weights_and_keeps_ties_within() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    layer = SurgicalLayer(module, "a")
    tuned = layer.surgical_copies["a"]
    assert tuned[1].weight is tuned[0].weight
    assert tuned[0].weight is not module[0].weight


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_deepcopy_and_pickle(twin: object) -> None:
    layer = layer_with("a", module=Block())
    other = twin(layer)
    assert type(other) is SurgicalLayer
    assert torch.equal(other(X)[0], layer(X)[0])
    assert other.scale is not layer.scale


def test_repr_names_the_method() -> None:
    assert repr(layer_with("a")).startswith("surgical.SurgicalLayer(")
