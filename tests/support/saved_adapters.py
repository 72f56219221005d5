"""Tuned toy models and their adapters, saved to a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from surgical_peft import SurgicalConfig
from tests.support.toys import Toy


def saved(model: nn.Module, config: SurgicalConfig, folder: Path, size: float = 0.02) -> Any:
    """The model tuned: every trainable weight moved by noise; saved to `folder`."""
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    tuned.eval().save_pretrained(folder)
    return tuned


def toy_adapter(
    toy: Toy, tmp_path: Path, dtype: torch.dtype = torch.float32, size: float = 0.02, **config: Any
) -> tuple[nn.Module, Any]:
    """The toy in `base/` and its adapter in `adapter/`; returns both models."""
    toy.model().to(dtype).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base = type(toy.build()).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    config = config or {"blocks": [toy.first, toy.last]}
    return copy.deepcopy(base), saved(base, SurgicalConfig(**config), tmp_path / "adapter", size)


@torch.no_grad()
def logits(model: nn.Module, toy: Toy) -> Tensor:
    return model(**toy.batch()).logits
