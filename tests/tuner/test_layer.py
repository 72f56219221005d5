from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from surgical_peft import SurgicalError
from surgical_peft.tuner.layer import SurgicalLayer
from surgical_peft.tuner.tensors.slots import BASE
from surgical_peft.tuner.tensors.tuned_tensors import Place

X = torch.ones(1, 3)


class Block(nn.Module):
    """Owns a parameter and a buffer itself, beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale + self.count


def layer_with(*adapters: str, module: nn.Module | None = None, keep_base: str = "device") -> SurgicalLayer:
    """A layer whose adapters differ from the base and from one another; the first is active."""
    owner = module or nn.Linear(3, 2)
    layer = SurgicalLayer(owner, keep_base)
    owner.add_module("surgical_", layer)
    names = [*owner._parameters, *owner._buffers]
    places = {name: [Place(owner, name)] for name in names}
    for number, name in enumerate(adapters, start=1):
        layer.add(name, places, set(owner._parameters))
        with torch.no_grad():
            for tensor in layer.tensors(name).values():
                tensor.add_(number)
    layer.set_adapter(adapters[0])
    return layer


def owner_of(layer: SurgicalLayer) -> nn.Module:
    return layer.get_base_layer()


def standing(layer: SurgicalLayer) -> set[str]:
    return {slot.standing for slot in layer.slots.values()}


def test_the_owner_trains_its_own_objects() -> None:
    linear = nn.Linear(3, 2)
    objects, before = dict(linear.named_parameters()), linear(X)
    layer = layer_with("a", module=linear)
    assert dict(linear.named_parameters()) == objects and all(p.requires_grad for p in objects.values())
    assert linear.weight is objects["weight"]
    layer.enable_adapters(False)
    assert linear.weight is not objects["weight"] and not linear.weight.requires_grad
    assert torch.equal(linear(X), before)


def test_only_the_active_adapter_trains() -> None:
    layer = layer_with("a", "b")
    assert [n for n in "ab" if any(t.requires_grad for t in layer.tensors(n).values())] == ["a"]
    layer.set_adapter("b", inference_mode=True)
    assert not any(t.requires_grad for n in "ab" for t in layer.tensors(n).values())
    layer.set_requires_grad(["a", "b"])
    assert all(t.requires_grad for n in "ab" for t in layer.tensors(n).values())
    layer.requires_grad_(False)  # as transformers does after loading
    assert not any(t.requires_grad for n in "ab" for t in layer.tensors(n).values())


def test_a_later_adapter_begins_with_the_base_and_has_hooks_and_attributes_of_the_first() -> None:
    linear = nn.Linear(3, 2)
    linear.weight.note = "kept"  # type: ignore[attr-defined]
    linear.weight.register_hook(torch.zeros_like)
    accumulated: list[Tensor] = []
    linear.weight.register_post_accumulate_grad_hook(accumulated.append)
    before = linear.weight.detach().clone()
    layer = layer_with("a", "b", module=linear)
    assert torch.equal(layer.tensors("b")["weight"], before + 2)
    layer.set_adapter("b")
    assert linear.weight.note == "kept"
    linear(X).sum().backward()
    assert not linear.weight.grad.any() and linear.bias.grad.any()
    assert [each is linear.weight for each in accumulated] == [True]


def test_switching_moves_no_number() -> None:
    layer = layer_with("a", "b", module=Block())
    tensors = {name: layer.tensors(name) for name in ("a", "b", BASE)}
    values = {name: {k: t.clone() for k, t in each.items()} for name, each in tensors.items()}
    for names in (["b"], [], ["a"], ["elsewhere"], ["b"]):
        layer.set_adapter(names)
        assert standing(layer) == {names[0] if names and names[0] in "ab" else BASE}
        for name, each in tensors.items():
            assert all(layer.tensors(name)[k] is t and torch.equal(t, values[name][k]) for k, t in each.items())


def test_merging_wins_over_switching_until_unmerged() -> None:
    layer = layer_with("a", "b")
    layer.merge(adapter_names=["b"])
    assert standing(layer) == {"b"}
    layer.unmerge()
    assert standing(layer) == {"a"}


def test_merging_twice_warns_and_stays() -> None:
    layer = layer_with("a")
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert layer.merged_adapters == ["a"] and standing(layer) == {"a"}


def test_two_adapters_are_not_merged_or_active_at_once() -> None:
    layer = layer_with("a", "b")
    with pytest.raises(SurgicalError, match=r"\['a', 'b'\]"):
        layer.merge(adapter_names=["a", "b"])
    layer.merge(adapter_names=["a"])
    with pytest.raises(SurgicalError, match=r"\['a', 'b'\]"), pytest.warns(UserWarning, match="additionally"):
        layer.merge(adapter_names=["b"])
    assert layer.merged_adapters == ["a"]
    layer.unmerge()
    with pytest.raises(SurgicalError, match=r"\['a', 'b'\]"):
        layer.set_adapter(["a", "b"])  # as transformers' set_adapter does, which asks nobody
    assert layer.active_adapters == ["a"] and standing(layer) == {"a"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(value: float) -> None:
    layer = layer_with("a")
    owner_of(layer).weight.data[0, 0] = value
    with pytest.raises(SurgicalError, match=r"adapter a .*weight"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    layer.merge()
    assert layer.merged


def test_disabling_unmerges_and_changes_no_flag() -> None:
    """Masks of policies stay as they are, and so do graphs that were recorded before."""
    layer = layer_with("a")
    owner_of(layer).bias.requires_grad_(False)
    layer.merge()
    loss = owner_of(layer)(X).sum()
    layer.enable_adapters(False)
    assert not layer.merged and standing(layer) == {BASE}
    assert not any(p.requires_grad for p in owner_of(layer).parameters())
    layer.enable_adapters(True)
    assert standing(layer) == {"a"}
    assert [p.requires_grad for p in owner_of(layer).parameters()] == [True, False]
    loss.backward()
    assert owner_of(layer).weight.grad is not None


@pytest.mark.parametrize("merged", [False, True])
def test_giving_back_leaves_the_owner_as_it_was(merged: bool) -> None:
    block = Block()
    objects = {**block._parameters, **block._buffers}
    before = {name: tensor.detach().clone() for name, tensor in objects.items()}
    layer = layer_with("a", "b", module=block)
    if merged:
        layer.merge(adapter_names=["b"])
    else:
        layer.set_adapter("b")
    layer.give_back()
    assert "surgical_" not in block._modules
    assert block.scale is objects["scale"]
    assert torch.equal(block.scale, before["scale"] + 2 * merged) and torch.equal(
        block.count, before["count"] + 2 * merged
    )


def test_deleting_the_active_adapter_takes_the_next() -> None:
    linear = nn.Linear(3, 2)
    own, before = linear.weight, linear(X)
    layer = layer_with("a", "b", module=linear)
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        layer.delete_adapter("a")
    assert layer.active_adapters == ["b"] and standing(layer) == {"b"}
    assert all(parameter.requires_grad for parameter in linear.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.delete_adapter("a")  # again
        layer.delete_adapter("b")
    assert "surgical_" not in linear._modules and linear.weight is own and torch.equal(linear(X), before)


def test_adapters_with_some_tensors_in_common_stand_by_tensor() -> None:
    linear = nn.Linear(3, 2)
    base = {name: p.detach().clone() for name, p in linear.named_parameters()}
    layer = layer_with("a", module=linear)
    layer.add("b", {"bias": [Place(linear, "bias")]}, {"bias"})
    layer.set_adapter("b")
    assert {name: slot.standing for name, slot in layer.slots.items()} == {"weight": BASE, "bias": "b"}
    assert torch.equal(linear.weight, base["weight"]) and linear.bias.requires_grad
    with pytest.raises(SurgicalError, match=r"\['a', 'b'\]"):
        layer.set_adapter(["a", "b"])


def test_in_place_there_is_no_base() -> None:
    linear = nn.Linear(3, 2)
    layer = layer_with("a", module=linear, keep_base="none")
    assert layer.tensors(BASE) == {} and not layer.state_dict()
    for verb in (
        lambda: layer.enable_adapters(False),
        lambda: layer.set_adapter("b"),
        lambda: layer.set_adapter([]),
        lambda: layer.delete_adapter("a"),
    ):
        with pytest.raises(SurgicalError, match="keep_base="):
            verb()
    assert standing(layer) == {"a"} and linear.weight.requires_grad


def test_a_state_dict_holds_what_is_parked_and_takes_it_back() -> None:
    layer, other = layer_with("a", "b"), layer_with("a", "b")
    state = owner_of(layer).state_dict()
    parked = {f"surgical_.{name}.{key}" for key in ("weight", "bias") for name in (BASE, "b")}
    assert state.keys() == {"weight", "bias", *parked}
    owner_of(other).load_state_dict(state)
    for name in ("a", "b", BASE):
        assert all(torch.equal(t, layer.tensors(name)[k]) for k, t in other.tensors(name).items())
    assert other.surgical_sets["a"].weight is owner_of(other).weight  # type: ignore[union-attr]


def test_a_state_dict_of_another_state_is_refused() -> None:
    """The weights that stand go by the same names, whosever they are."""
    layer, other = layer_with("a"), layer_with("a")
    other.enable_adapters(False)
    with pytest.raises(RuntimeError, match="surgical_"):
        owner_of(layer).load_state_dict(owner_of(other).state_dict())


def test_dtype_and_device_go_with_the_owner() -> None:
    layer = layer_with("a", "b", module=Block())
    owner_of(layer).to(torch.bfloat16)
    assert {t.dtype for name in ("a", "b", BASE) for t in layer.tensors(name).values()} == {torch.bfloat16}
    owner_of(layer).to("meta")
    assert {t.device.type for name in ("a", "b", BASE) for t in layer.tensors(name).values()} == {"meta"}


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_deepcopy_and_pickle(twin: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_with("a", module=Block())
    block = owner_of(layer)
    other = twin(block)
    assert torch.equal(other(X), block(X))
    theirs: SurgicalLayer = other._modules["surgical_"]  # type: ignore[assignment]
    assert owner_of(theirs) is other
    theirs.enable_adapters(False)
    assert not torch.equal(other(X), block(X))
    assert standing(layer) == {"a"}


def test_it_stands_aside_of_the_forward_pass() -> None:
    """Some modules call all their children in turn."""
    assert torch.equal(layer_with("a")(X), X)


def test_a_weight_that_was_taken_out_of_its_module_is_missed_by_name() -> None:
    layer = layer_with("a")
    torch.nn.utils.prune.l1_unstructured(owner_of(layer), "weight", amount=1)
    with pytest.raises(SurgicalError, match=r"Linear.*weight"):
        layer.enable_adapters(False)


def test_what_is_parked_follows_a_module_that_was_moved_weight_by_weight() -> None:
    """As accelerate's dispatch_model does; meta stands for an accelerator."""
    layer = layer_with("a", "b")
    owner = owner_of(layer)
    for name, parameter in dict(owner.named_parameters()).items():
        setattr(owner, name, nn.Parameter(parameter.detach().to("meta")))
    for names in (["b"], [], ["a"]):
        layer.set_adapter(names)
        assert {parameter.device.type for parameter in owner.parameters()} == {"meta"}
