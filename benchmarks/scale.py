"""Finding blocks, wrapping, saving and loading at growing numbers of modules, into `benchmarks/scale.md`.

    python benchmarks/scale.py          # about 2 minutes on one core

CPU seconds of one process. What counts is the ratio to the row above, which has half as many modules: 2 is linear.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig
from surgical_peft.experiments.training.provenance import machine, today, versions

LAYERS = (200, 400, 800, 1600, 3200)
LISTS = (100, 200, 400)


class Layer(nn.Module):
    """Three modules, which is four with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)


def deep(count: int) -> nn.Module:
    """A model of so many layers and a head."""
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(count)), "head": nn.Linear(4, 2)})


def nested(count: int) -> nn.Module:
    """So many lists, each in the next, beside as many layers."""
    model: nn.Module = nn.Linear(3, 3)
    for _ in range(count):
        model = nn.Sequential(model, nn.Linear(3, 3))
    return nn.ModuleDict({"nested": model, "layers": nn.ModuleList(Layer() for _ in range(count))})


def seconds(action: Callable[[], Any]) -> float:
    """CPU seconds that a call takes."""
    began = time.process_time()
    action()
    return time.process_time() - began


def rows() -> list[list[float]]:
    """For each size the number of modules and the seconds of finding, wrapping, saving and loading."""
    measured = []
    for count in LAYERS:
        model, config = deep(count), SurgicalConfig(blocks=[f"0:{count // 2}"])
        row = [float(len(list(model.modules()))), seconds(lambda model=model: BlockMap.find(model))]
        row.append(seconds(lambda model=model, config=config: get_peft_model(model, config)))
        wrapped = get_peft_model(deep(count), config)
        with tempfile.TemporaryDirectory() as folder:
            row.append(seconds(lambda wrapped=wrapped, folder=folder: wrapped.save_pretrained(folder)))
            fresh = deep(count)
            row.append(seconds(lambda fresh=fresh, folder=folder: PeftModel.from_pretrained(fresh, folder)))
        measured.append(row)
    return measured


def with_ratios(values: list[float]) -> list[str]:
    """Each value with its ratio to the one before."""
    before = [None, *values]
    return [
        f"{value:.2f}" + (f" ({value / old:.1f})" if old else "") for old, value in zip(before, values, strict=False)
    ]


def main() -> None:
    """Measure and write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    modules, *columns = zip(*rows(), strict=True)
    cells = [with_ratios(list(column)) for column in columns]
    lines = ["| modules | find, s | wrap, s | save, s | load, s |", "| ---: | ---: | ---: | ---: | ---: |"]
    lines += [f"| {int(n):,} | {' | '.join(row)} |" for n, row in zip(modules, zip(*cells, strict=True), strict=True)]
    models = {count: nested(count) for count in LISTS}
    found = with_ratios([seconds(lambda model=model: BlockMap.find(model)) for model in models.values()])
    lines += ["", "| lists in lists | find, s |", "| ---: | ---: |"]
    lines += [f"| {count} | {cell} |" for count, cell in zip(LISTS, found, strict=True)]
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines += ["", f"In brackets the ratio to the row above. CPU seconds. {today()}, {packages}; {machine()}."]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
