"""The frozen start of a model, run once: below the tuned unit every step would compute the same outputs again."""

from __future__ import annotations

from typing import Any

import torch
from shifts import SPLITS, Split, Task
from torch import nn

INPUT = {"image": "pixel_values", "mail": "inputs_embeds"}  # by which the outputs of the start come in


class Prefix:
    """What enters each layer of a task's source model, for all its examples.

    Frozen layers are in eval mode, so that a model with its start cut off is trained and measured as the whole one
    would be, but for the rounding.
    """

    def __init__(self, task: Task, batch_size: int = 100) -> None:
        self.kind = task.kind
        self.splits = {split: getattr(task, split) for split in SPLITS}
        model = task.model()
        self.states = {split: entering(model, data, batch_size) for split, data in self.splits.items()}

    def depth(self, names: tuple[str, ...], unit: str) -> int:
        """How many layers lie before a unit, out of the names of all units."""
        before = names[: names.index(unit)] if unit in names else ()
        return sum(name.isdigit() for name in before)

    def cut(self, model: Any, depth: int) -> dict[str, Split]:
        """Take embeddings and `depth` layers off a wrapped model; returns the splits as it wants them from now on."""
        encoder = model.get_base_model().base_model
        if self.kind == "image":
            encoder.layers = encoder.layers[depth:]
        else:
            encoder.encoder.layer = encoder.encoder.layer[depth:]
        encoder.embeddings.forward = passed_on
        name = INPUT[self.kind]
        kept = {"labels", "attention_mask"}
        return {
            split: {name: self.states[split][depth], **{key: data[key] for key in kept & data.keys()}}
            for split, data in self.splits.items()
        }


def passed_on(pixel_values: Any = None, inputs_embeds: Any = None, **others: Any) -> torch.Tensor:
    """Instead of embeddings, where their outputs are the inputs already."""
    return inputs_embeds if pixel_values is None else pixel_values


@torch.inference_mode()
def entering(model: nn.Module, split: Split, batch_size: int) -> list[torch.Tensor]:
    """What enters each layer, and behind them what leaves the last."""
    model.eval()
    inputs = {name: values for name, values in split.items() if name != "labels"}
    collected = []
    for rows in torch.arange(len(split["labels"])).split(batch_size):
        batch = {name: values[rows] for name, values in inputs.items()}
        collected.append(model(**batch, output_hidden_states=True).hidden_states)
    return [torch.cat(states).clone() for states in zip(*collected, strict=True)]
