"""Models whose layers cannot be guessed: attributes, a dictionary of unlike modules, two lists of unlike modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from tests.support.plain import Plain


class Gate(nn.Module):
    """One weight matrix, as a layer that is no `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.sigmoid(hidden @ self.weight)


class Steps(nn.Module):
    """A stem, the steps that a subclass makes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.make()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def make(self) -> None:
        raise NotImplementedError

    def steps(self) -> Iterable[nn.Module]:
        raise NotImplementedError

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.stem(inputs)
        for step in self.steps():
            hidden = hidden + step(hidden)
        logits = self.head(self.norm(hidden).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ModelOutput(logits=logits, loss=loss)


class Attributes(Steps):
    """`step1`, `step2`, ... in a module of their own."""

    def make(self) -> None:
        self.body = nn.Module()
        self.body.step1, self.body.step2, self.body.step3 = nn.Linear(8, 8), Gate(), nn.Linear(8, 8)

    def steps(self) -> Iterable[nn.Module]:
        return self.body.children()


class Named(Steps):
    """Steps in an `nn.ModuleDict`."""

    def make(self) -> None:
        self.body = nn.ModuleDict({"read": nn.Linear(8, 8), "skip": nn.Identity(), "gate": Gate(), "mix": Gate()})

    def steps(self) -> Iterable[nn.Module]:
        return self.body.values()


class Lists(Steps):
    """Two lists in two parts, the second with a norm of its own."""

    def make(self) -> None:
        self.reader, self.writer = nn.Module(), nn.Module()
        self.reader.parts = nn.ModuleList([nn.Linear(8, 8), Gate()])
        self.writer.parts = nn.ModuleList([Gate(), nn.Linear(8, 8)])
        self.writer.norm = nn.LayerNorm(8)

    def steps(self) -> Iterable[nn.Module]:
        return [*self.reader.parts, *self.writer.parts, self.writer.norm]


@dataclass(frozen=True)
class Unusual(Plain):
    """With the `layers` that say which modules are its layers."""

    layers: str | list[str] = ""


ONE_STACK = ("embeddings", "0", "1", "2", "final_norm", "head")
TWO_STACKS = ("embeddings", "reader.0", "reader.1", "writer.0", "writer.1", "writer.final_norm", "final_norm", "head")
UNUSUAL = {
    toy.name: toy
    for toy in (
        Unusual("attributes", Attributes, ONE_STACK, "0", "2", "body.step*"),
        Unusual("named", Named, ONE_STACK, "0", "2", "body"),
        Unusual("lists", Lists, TWO_STACKS, "reader.0", "writer.1", ["reader.parts", "writer.parts"]),
    )
}
