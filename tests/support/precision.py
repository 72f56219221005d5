"""A small Llama in 16 bits, its steps, and an optimizer that rounds by itself."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from surgical_peft import SurgicalConfig
from tests.support.toys import TOYS


def wrapped(dtype: torch.dtype = torch.bfloat16, blocks: Any = "all", **kwargs: Any) -> PeftModel:
    return get_peft_model(TOYS["llama"].model().to(dtype), SurgicalConfig(blocks=blocks, **kwargs)).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    optimizer.zero_grad()
    loss = model(**TOYS["llama"].batch(seed)).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class RoundsAtRandom(torch.optim.SGD):
    def __init__(self, params: Any, lr: float, bf16_stochastic_round: bool = False) -> None:
        super().__init__(params, lr=lr)
        self.bf16_stochastic_round = bf16_stochastic_round
