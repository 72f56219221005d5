"""Who tunes 16-bit weights without masters is told so, once; nobody else is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from surgical_peft import SurgicalConfig, SurgicalError, create_surgical_optimizer
from surgical_peft.precision import foreign_optimizers
from tests.support.precision import RoundsAtRandom, step, trained, wrapped
from tests.support.toys import TOYS


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process where nothing has been told yet."""
    monkeypatch.setattr(foreign_optimizers, "_told", False)


def told(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(2):
            step(model, optimizer, seed)
    return sum("create_surgical_optimizer" in str(each.message) for each in caught)


def test_whoever_tunes_in_16_bit_by_another_optimizer_is_told_once(untold: None) -> None:
    model = wrapped()
    assert told(model, create_surgical_optimizer(model, torch.optim.SGD, lr=1e-3)) == 0
    assert told(wrapped(torch.float32), torch.optim.SGD(trained(wrapped(torch.float32)), lr=1e-3)) == 0
    bare = TOYS["llama"].model().bfloat16()
    assert told(bare, torch.optim.SGD(bare.parameters(), lr=1e-3)) == 0  # none of our business
    assert told(model, RoundsAtRandom(trained(model), lr=1e-3, bf16_stochastic_round=True)) == 0
    assert told(model, torch.optim.SGD(trained(model), lr=1e-3)) == 1
    assert told(model, torch.optim.AdamW(trained(model), lr=1e-3)) == 0


def test_an_adapter_or_a_dtype_that_came_later_counts(untold: None) -> None:
    model = wrapped(torch.float32)
    model.add_adapter("second", SurgicalConfig(blocks=[0]))
    model.set_adapter("second")
    model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    remove = register_optimizer_step_pre_hook(lambda *_: None).remove  # torch goes through the hooks meanwhile
    assert told(model, optimizer) == 1
    remove()


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_another_optimizer_beside_ours_on_float16_weights_is_refused(wrap: bool, cls: Any) -> None:
    """Gradients are float32 for ours, which others stumble over or not, as they are."""
    model = wrapped(torch.float16) if wrap else TOYS["llama"].model().half()
    weights = trained(model)
    others = [
        cls(weights, lr=1e-3),
        create_surgical_optimizer(model, cls, lr=1e-3, master_weights=False),
    ]
    ours = create_surgical_optimizer(model, torch.optim.SGD, lr=1e-3)
    for other in others:
        before = [weight.detach().clone() for weight in weights]
        with pytest.raises(SurgicalError, match="float16"):
            step(model, other)
        assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
    step(model, ours)
    elsewhere = wrapped(torch.float16)
    step(elsewhere, cls(trained(elsewhere), lr=1e-3))
    del ours
    for other in others:
        step(model, other)
