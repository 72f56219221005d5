"""What is done to find, wrap, save and load grows with the number of modules, not with its square."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)


def deep(count: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(count))
    model.head = nn.Linear(2, 2)
    return model


def nested(count: int) -> nn.Module:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(count):
        model = nn.Sequential(model, nn.Linear(2, 2))
    return nn.ModuleDict({"nested": model, "layers": nn.ModuleList(Layer() for _ in range(count))})


def calls(action: Callable[[], Any]) -> int:
    """The number of Python functions called, and of steps of generators."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def steps(count: int, folder: Path) -> dict[str, int]:
    model, config = deep(count), SurgicalConfig(blocks=["::2", "head"])
    found = {"find": calls(lambda: BlockMap.find(model)), "find in lists": calls(lambda: BlockMap.find(nested(count)))}
    found["wrap"] = calls(lambda: get_peft_model(model, config))
    wrapped = get_peft_model(deep(count), config)
    found["save"] = calls(lambda: wrapped.save_pretrained(folder))
    found["load"] = calls(lambda: PeftModel.from_pretrained(deep(count), folder))
    return found


def test_twice_the_modules_take_twice_the_steps(tmp_path: Path) -> None:
    """A chain of 400 lists took four minutes, and 3,000 modules 19 seconds to wrap."""
    few, many = steps(60, tmp_path / "few"), steps(120, tmp_path / "many")
    ratios = {action: many[action] / few[action] for action in few}
    assert all(ratio < 2.5 for action, ratio in ratios.items() if action != "find in lists"), ratios
    assert ratios["find in lists"] < 5, ratios  # a list may be the list of layers of each that it lies in
