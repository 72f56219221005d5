"""What modules keep from one forward pass for the next: put back, and never used by scoring."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from surgical_peft import SurgicalError, criteria, score_blocks
from surgical_peft.criteria.criterion import needs_of

Batch = dict[str, Tensor]


class Table:
    """A cache of its own class."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}


class Keeper(nn.Module):
    """Keeps what depends on its weight, in every way that there is, for as long as it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.count = 0
        self.cached: Tensor | None = None
        self.by_key: dict[str, Tensor] = {"old": torch.ones(1)}
        self.listed: list[list[Tensor]] = [[]]
        self.table = Table()
        self.cache = DynamicCache()
        self.register_buffer("ready", None, persistent=False)

    def train(self, mode: bool = True) -> Keeper:
        if mode:
            self.cached = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ self.weight.tanh()
        if self.cached is None:
            self.cached = self.weight.tanh()
        self.count += 1
        self.fresh = self.cached * 2
        self.by_key["new"] = self.by_key.pop("old", self.cached)
        self.listed[0].append(self.cached)
        self.table.rows["row"] = self.cached
        self.cache.update(self.cached[None, None], self.cached[None, None], 0)
        self.ready = self.cached.detach()
        return x @ self.cached


class Keepers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Keeper() for _ in range(3))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])


def batches(count: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, 4, generator=generator), "labels": torch.tensor([0, 1, 2, 0])} for _ in range(count)]


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    return [
        vars(layer)
        | {f"{name} inside": getattr(layer, name).copy() for name in ("by_key", "_buffers")}
        | {"listed inside": list(layer.listed[0]), "rows": dict(layer.table.rows), "layers": list(layer.cache.layers)}
        for layer in model.layers
    ]


def assert_same(now: Any, before: Any) -> None:
    """The same objects, in the same places."""
    if isinstance(before, dict):
        assert now.keys() == before.keys()
        now, before = list(now.values()), list(before.values())
    if isinstance(before, list):
        assert len(now) == len(before)
        for mine, theirs in zip(now, before, strict=True):
            assert_same(mine, theirs)
    else:
        assert now is before or now == before


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
@pytest.mark.parametrize("name", criteria.__all__)
def test_no_criterion_uses_or_leaves_what_modules_keep(name: str, used: bool) -> None:
    model = Keepers().eval()
    if used:  # the graph of what it keeps is gone
        loss_of(model, batches()[0]).backward()
        model.zero_grad()
    before = state_of(model)
    scores = score_blocks(model, batches(), name, loss_fn=loss_of)
    assert_same(state_of(model), before)
    assert all(not layer.training for layer in model.layers)

    def in_train_mode(model: nn.Module, batch: Batch) -> Tensor:
        for layer in model.layers:
            layer.train()  # keeps nothing
        return loss_of(model, batch)

    expected = score_blocks(Keepers().eval(), batches(), name, loss_fn=in_train_mode)
    assert scores.values == pytest.approx(expected.values, rel=1e-5)
    assert needs_of(getattr(criteria, name)).batches == 0 or all(map(math.isfinite, scores.values.values()))


def test_an_error_leaves_nothing_either() -> None:
    model = Keepers().train()
    before = state_of(model)
    bad = batches()
    bad[2]["x"][0, 0] = float("nan")
    with pytest.raises(SurgicalError):
        score_blocks(model, bad, loss_fn=loss_of)
    assert_same(state_of(model), before)
    assert all(module.training for module in model.modules())


def test_statistics_that_a_loss_function_moves_are_put_back() -> None:
    model = Keepers().eval()
    before = {name: buffer.clone() for name, buffer in model.norm.named_buffers()}
    score_blocks(model, batches(), loss_fn=lambda model, batch: loss_of(model.train(), batch))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.norm.named_buffers())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert all(layer.training for layer in self.layers)  # else cuDNN refuses the backward pass
        x = x[:, None]
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x[:, 0])


def test_recurrent_layers_are_scored_without_dropout_and_put_back() -> None:
    model = Recurrent().eval()
    scores = score_blocks(model, batches(), loss_fn=loss_of)
    assert score_blocks(model, batches(), loss_fn=loss_of) == scores
    assert all((layer.training, layer.dropout) == (False, 0.5) for layer in model.layers)
