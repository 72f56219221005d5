"""Short trainings with and without the prefix cache, and which modules ran in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgical_peft.prefix_cache import PrefixCache, cache_prefix

COUNT, SIZE, EPOCHS = 12, 4, 3


@dataclass
class Training:
    """What came of one: trained weights, losses, and how often the watched module ran in each epoch."""

    weights: dict[str, Tensor]
    losses: list[float]
    ran: list[int] = field(default_factory=list)
    cache: PrefixCache | None = None

    def same_as(self, other: Training, rtol: float = 1e-4, atol: float = 1e-6) -> None:
        """Assert that the weights are those of another one."""
        assert self.weights.keys() == other.weights.keys() and self.weights
        for name, weight in self.weights.items():
            torch.testing.assert_close(weight, other.weights[name], rtol=rtol, atol=atol)


def train(
    model: nn.Module,
    examples: dict[str, Tensor],
    watched: str | None = None,
    cached: dict[str, Any] | None = None,
    batch_of: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]] | None = None,
    epochs: int = EPOCHS,
    **given: Any,
) -> Training:
    """Train what has gradients, shuffled, with AdamW.

    Args:
        watched: the end of the name of a module; its runs are counted.
        cached: arguments of `cache_prefix`; None for no cache.
        batch_of: makes a batch of the examples at some places; default is these rows.
        given: further arguments of the model.
    """
    ran: list[int] = []

    def count(*_: Any) -> None:
        ran[-1] += 1

    with ExitStack() as stack:
        cache = None if cached is None else stack.enter_context(cache_prefix(model, **cached))
        if watched:
            (module,) = (module for name, module in model.named_modules() if name.endswith(watched))
            stack.callback(module.register_forward_hook(count).remove)
        tuned = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        optimizer = torch.optim.AdamW(tuned.values(), lr=1e-2)
        order, losses = torch.Generator().manual_seed(5), []
        torch.manual_seed(3)
        model.train()
        for _ in range(epochs):
            ran.append(0)
            for at in torch.randperm(len(next(iter(examples.values()))), generator=order).split(SIZE):
                rows = {name: value[at] for name, value in examples.items()}
                loss = model(**(batch_of(examples, at) if batch_of else rows), **given).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
    weights = {name: weight.detach().clone() for name, weight in tuned.items()}
    return Training(weights, losses, ran, cache)


def padded(examples: dict[str, Tensor], side: str = "right") -> dict[str, Tensor]:
    """Texts of 4, 5 and 6 tokens, with a mask; labels of tokens say where they are padded."""
    examples = {name: value.clone() for name, value in examples.items()}
    mask = torch.ones_like(examples["input_ids"])
    for at, row in enumerate(mask):
        row[: at % 3] = 0
    mask = mask if side == "left" else mask.flip(1)
    examples["input_ids"][mask == 0] = 0
    if examples["labels"].ndim == 2:
        examples["labels"][mask == 0] = -100
    return {**examples, "attention_mask": mask}


def to_the_longest(examples: dict[str, Tensor], at: Tensor) -> dict[str, Tensor]:
    """A batch without the columns that are padding in all of its texts, as a collator makes it."""
    rows = {name: value[at] for name, value in examples.items()}
    real = rows["attention_mask"].bool().any(0)
    return {name: value[:, real] if value.ndim == 2 else value for name, value in rows.items()}
