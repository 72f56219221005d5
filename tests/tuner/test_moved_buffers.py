"""Buffers that training moves are saved with the adapter, or the one who saves is told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from surgical_peft import SurgicalConfig
from tests.support.families import FAMILIES
from tests.support.wrapping import logits, no_warnings, same, weights


class Average(nn.Module):
    """Takes off a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            move(self.mean, x)
        return x - self.mean


class Always(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        move(self.mean, x)
        return x - self.mean


def move(mean: Tensor, x: Tensor) -> None:
    mean.mul_(0.9).add_(x.detach().mean((0, 2))[:, None], alpha=0.1)


class Across(nn.Module):
    """A linear map over the channels."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.linear = norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2)).transpose(1, 2)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(6),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "LazyBatchNorm": nn.LazyBatchNorm1d,
    "InstanceNorm": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "spectral_norm": lambda: Across(spectral_norm),
    "parametrized": lambda: Across(parametrizations.spectral_norm),
    "user's": Average,
}


def net(kind: Callable[[], nn.Module]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Conv1d(6, 6, 1), kind(), nn.Conv1d(6, 6, 1)) for _ in "abc"])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Net()
    model(INPUT)  # lazy ones get their shapes
    return model.eval()


INPUT = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))


def trained(model: Any, steps: int = 3) -> Any:
    model.train()
    for _ in range(steps):
        model(INPUT)
    return model.eval()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "surgical_" not in n}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_in_frozen_blocks_is_saved(kind: str, tmp_path: Path) -> None:
    base, again = net(KINDS[kind]), net(KINDS[kind])
    before = values(base)
    model = trained(get_peft_model(base, SurgicalConfig(blocks=[1], frozen_eval=False)))
    moved = values(model.get_base_model())
    assert {n for n in before if not torch.equal(moved[n], before[n]) and "layers.0" in n}
    with no_warnings():
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(again, tmp_path, strict_base=True).eval()
    assert equal(values(loaded.get_base_model()), moved)
    torch.testing.assert_close(loaded(INPUT), model(INPUT), rtol=1e-6, atol=1e-6)
    with loaded.disable_adapter():
        assert equal(values(loaded.get_base_model()), before)
    assert equal(values(model.unload()), before)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_eval_keeps_it_still(kind: str, tmp_path: Path) -> None:
    base = net(KINDS[kind])
    before = values(base)
    model = trained(get_peft_model(base, SurgicalConfig(blocks=[1])))
    after = values(model.get_base_model())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("layers.1" in name for name in moved)
    with no_warnings():
        model.save_pretrained(tmp_path)
    assert not [key for key in weights(tmp_path) if "layers.0" in key or "layers.2" in key]


@pytest.mark.parametrize("name", ["resnet", "levit"])
@pytest.mark.parametrize("native", [False, True])
def test_batchnorm_of_real_models(name: str, native: bool, tmp_path: Path) -> None:
    """transformers' add_adapter keeps no one who could hold frozen blocks in eval mode: its statistics were lost."""
    family = FAMILIES[name]
    base: Any = family.model()
    config = SurgicalConfig(blocks=[family.last], frozen_eval=native)
    if native:
        base.add_adapter(config)
    model = base if native else get_peft_model(base, config)
    before = values(model)
    trained_on(model, family)
    moved = [n for n, buffer in values(model).items() if not torch.equal(buffer, before[n]) and "stages.0" in n]
    assert moved
    expected = logits(model, family.batch())
    with no_warnings():
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.model(), tmp_path, strict_base=True).eval()
    assert same(logits(loaded, family.batch()), expected)
    again: Any = family.model()
    again.load_adapter(str(tmp_path))
    assert same(logits(again.eval(), family.batch()), expected)
    again.disable_adapters()
    assert same(logits(again, family.batch()), logits(family.model(), family.batch()))


def trained_on(model: Any, family: Any) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in range(3):
        model(**family.batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("native", [False, True])
def test_what_moves_otherwise_is_told(native: bool, tmp_path: Path) -> None:
    """By a mode that was set behind our back, or in any mode."""
    family = FAMILIES["resnet"]
    first: Any = get_peft_model(family.model(), SurgicalConfig(blocks=[family.last]))
    first.save_pretrained(tmp_path / "first")
    model: Any = family.model()
    if native:
        model.load_adapter(str(tmp_path / "first"), is_trainable=True)
    else:
        model = PeftModel.from_pretrained(model, tmp_path / "first", is_trainable=True)
    for module in model.modules():
        module.training = True
    model(**family.batch())
    with pytest.warns(UserWarning, match="running_mean.*changed since"):
        model.save_pretrained(tmp_path / "second")
    other = trained(get_peft_model(net(Always), SurgicalConfig(blocks=[1])))
    with pytest.warns(UserWarning, match=r"layers\.0\.1\.mean.*changed since"):
        other.save_pretrained(tmp_path / "third")


def test_another_dtype_or_adapter_is_no_change(tmp_path: Path) -> None:
    model = get_peft_model(net(KINDS["BatchNorm"]), SurgicalConfig(blocks=[1]), "still")
    model.add_adapter("moving", SurgicalConfig(blocks=[0], frozen_eval=False))
    model.set_adapter("moving")
    trained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
        copy.deepcopy(model).double().save_pretrained(tmp_path)
