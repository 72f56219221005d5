"""Shared by the tests of criteria: a formula in plain words, and a model of experts that gives its loss itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from surgical_peft import BlockMap


def plain_depth_gain(model: nn.Module, gains: dict[str, float]) -> dict[str, float]:
    """The formula, with depths told from the order of the blocks."""
    sizes = {block: sum(p.numel() for p in each) for block, each in BlockMap.find(model).parameters(model).items()}
    layers = [block for block in gains if block.isdigit()]
    depths = {block: int(block) / len(layers) if block.isdigit() else block != "embeddings" for block in gains}
    most = max(gains.values())
    credit = 16 * gains["head"] / most if gains.get("head") else math.e
    return {
        block: gain / most * (sizes[block] / max(sizes[each] for each in gains)) ** 0.25 * credit ** depths[block]
        for block, gain in gains.items()
    }


class Routed(nn.Module):
    """Layers of two experts each, of which each example uses the one that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(3))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.stack([layer[int(which)](row) for row, which in zip(x, expert, strict=True)])
        return x.square().mean()


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)
