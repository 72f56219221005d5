"""Models that accelerate has offloaded are scored as the plain ones, and come back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

from surgical_peft import SurgicalError, criteria, score_blocks
from surgical_peft.criteria.criterion import needs_of
from tests.support.criteria import Routed, own_loss
from tests.support.toys import TOYS, Batch

NEEDS = {name: needs_of(getattr(criteria, name)) for name in criteria.__all__}
TRAIN = [name for name, needs in NEEDS.items() if needs.what == "model" and needs.batches]
Offload = Callable[[nn.Module, Path], nn.Module]


def to_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def to_disk(model: nn.Module, folder: Path) -> nn.Module:
    """The first child on disk, the others in place."""
    places = {name: "cpu" for name, _ in model.named_children()}
    places[next(iter(places))] = "disk"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def data_of(name: str) -> list[Batch]:
    return [TOYS[name].batch(0), TOYS[name].batch(1, size=3)]


class State:
    """What scoring must leave as it was: the tensors in the modules, their flags and values, and the hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
        self.flags = [parameter.requires_grad for *_, parameter in self.parameters]
        self.hooks = [(module, getattr(module, "_hf_hook", None)) for module in model.modules()]

    def assert_unchanged(self) -> None:
        assert all(module._parameters[name] is parameter for module, name, parameter in self.parameters)
        assert [parameter.requires_grad for *_, parameter in self.parameters] == self.flags
        assert all(parameter.grad is None for *_, parameter in self.parameters)
        assert all(getattr(module, "_hf_hook", None) is hook for module, hook in self.hooks)


def half_frozen(name: str) -> nn.Module:
    model = TOYS[name].model()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("offload", [to_cpu, to_disk])
@pytest.mark.parametrize("name", [name for name in criteria.__all__ if name not in TRAIN])
def test_scores_are_those_of_the_plain_model(name: str, offload: Offload, memory: str, tmp_path: Path) -> None:
    expected = score_blocks(TOYS["bert"].model(), data_of("bert"), name)
    model = offload(half_frozen("bert"), tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    before = State(model)
    scores = score_blocks(model, data_of("bert"), name, memory=memory)
    before.assert_unchanged()
    assert scores.values == pytest.approx(expected.values, rel=1e-6)
    assert (scores.sizes, scores.unscored) == (expected.sizes, expected.unscored)
    model(**data_of("bert")[0])  # it still runs


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
@pytest.mark.parametrize("name", ["rgn", "bvr", "fisher"])
@pytest.mark.parametrize("toy_name", ["gpt2", "t5"])
def test_tied_weights_and_modules_called_twice(toy_name: str, name: str, offload: Offload, tmp_path: Path) -> None:
    """Each use of an offloaded weight is another tensor: the gradients of all but the last were lost."""
    expected = score_blocks(TOYS[toy_name].model(), data_of(toy_name), name, "tensor")
    model = offload(half_frozen(toy_name), tmp_path)
    before = State(model)
    for _ in range(2):  # a forward pass unties the stand-ins
        scores = score_blocks(model, data_of(toy_name), name, "tensor")
        assert scores.values == pytest.approx(expected.values, rel=1e-6)
        before.assert_unchanged()
    model(**data_of(toy_name)[0])
    assert score_blocks(model, data_of(toy_name), name, "tensor").values == pytest.approx(expected.values, rel=1e-6)


def test_an_offloaded_expert_without_a_token_has_no_score() -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(3, 4), "expert": torch.zeros(3, dtype=torch.long)}]
    with pytest.warns(UserWarning, match="layers.0.1"):
        scores = score_blocks(cpu_offload(Routed()), data, granularity="module", loss_fn=own_loss)
    assert "layers.0.1" in scores.unscored and scores.values["layers.0.0"] > 0


def test_offloaded_units_of_zeros_are_left_out() -> None:
    model = TOYS["bert"].model()
    nn.init.zeros_(model.classifier.bias)
    scores = score_blocks(cpu_offload(model), data_of("bert"), granularity="tensor")
    assert scores.unscored == ("classifier.bias",)


class Scaled(nn.Module):
    """Holds a weight itself, so that accelerate gives it two hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers[1](self.layers[0](x)) * self.scale).square().mean()


def test_a_weight_of_the_outermost_module_is_seen() -> None:
    torch.manual_seed(0)
    model, data = Scaled(), [{"x": torch.randn(3, 4)}]
    expected = score_blocks(model, data, granularity="tensor", loss_fn=own_loss).values
    assert score_blocks(cpu_offload(model), data, granularity="tensor", loss_fn=own_loss).values == expected


@pytest.mark.parametrize("name", TRAIN)
def test_a_criterion_of_the_whole_model_is_refused(name: str) -> None:
    model = cpu_offload(TOYS["bert"].model())
    before = State(model)
    with pytest.raises(SurgicalError, match=f"{name} .*offloaded"):
        score_blocks(model, data_of("bert"), name)
    before.assert_unchanged()


def test_the_model_is_untouched_after_an_error() -> None:
    model = cpu_offload(half_frozen("vit"))
    before = State(model)
    data = data_of("vit")
    data[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(SurgicalError, match="in batch 1"):
        score_blocks(model, data)
    before.assert_unchanged()
