"""Models without a transformers class: recurrent, with layers that are `nn.Sequential`, with lone parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tests.support.toys import Batch, Toy


@dataclass(frozen=True)
class Plain(Toy):
    """Takes 6 steps of 8 numbers, gives 3 classes."""

    def batch(self, seed: int = 0, size: int = 4) -> Batch:
        generator = torch.Generator().manual_seed(100 + seed)
        inputs = torch.randn(size, 6, 8, generator=generator)
        return {"inputs": inputs, "labels": torch.randint(0, 3, (size,), generator=generator)}


class Net(nn.Module):
    """Layers, then a head on the mean of the steps."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        hidden = self.stem(inputs)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden.mean(1))
        return ModelOutput(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


class Recurrent(nn.Module):
    """An LSTM, which keeps a list of its weights beside the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.out(self.lstm(hidden)[0])


class Lone(nn.Module):
    """Parameters in a list, in a dictionary, and of the layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 8) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.ones(8)), "shift": nn.Parameter(torch.zeros(8))})
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        for weight in self.listed:
            hidden = torch.tanh(hidden @ weight)
        return self.gate * hidden * self.named["scale"] + self.named["shift"]


class Listing(nn.Sequential):
    """A list of modules with a weight of its own; one module's weight is a parametrization."""

    def __init__(self) -> None:
        super().__init__(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, hidden: Tensor) -> Tensor:
        assert len(self) == 2
        return super().forward(hidden) * self.scale


def _sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(8, 8))


BLOCKS = ("embeddings", "0", "1", "2", "head")
PLAIN = {
    each.name: each
    for each in (
        Plain("lstm", lambda: Net(*[Recurrent() for _ in range(3)]), BLOCKS, "0", "2"),
        Plain("sequential", lambda: Net(*[_sequential() for _ in range(3)]), BLOCKS, "0", "2"),
        Plain("listing", lambda: Net(*[Listing() for _ in range(3)]), BLOCKS, "0", "2"),
        Plain("lone", lambda: Net(*[Lone() for _ in range(3)]), BLOCKS, "0", "2"),
    )
}
