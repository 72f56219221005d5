"""Restores a model after scoring, with the caches that a forward pass leaves in modules beside their weights."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import cache_utils

from ..criteria.criterion import can_train, reshard

# Not looked at: weights, children, hooks and modes, and how accelerate or we have a module called.
_NOT_OURS = {*vars(nn.Module()), "forward", "_old_forward", "_hf_hook"} - {"_buffers", "_non_persistent_buffers_set"}
_DEPTH = 3  # of a transformers cache: its attributes, its list of layers, the attributes of each

Container = dict[Any, Any] | list[Any] | set[Any]


class Leftovers:
    """A snapshot of the attributes of all modules: `clear` removes what was added and restores what was replaced.

    Needed for models that keep in eval mode what they compute in one forward pass for the next, such as LeViT's
    attention biases: with the graph that led to them, of which a second backward pass finds nothing left.

    Followed are dicts, lists and sets, and objects of a class that is written in the module's own file or is a cache
    of transformers. No tensor is copied but the statistics of batch normalizations, which move in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = [(vars(module), _attributes(module)) for module in model.modules()]
        self._inside: list[tuple[Container, Container]] = []
        seen: set[int] = set()
        for module in model.modules():
            homes = {type(module).__module__, cache_utils.__name__}
            for value in _attributes(module).values():
                self._inside += [
                    (container, container.copy()) for container in _containers(value, homes, seen, _DEPTH)
                ]
        self._statistics = [
            (buffer, buffer.clone())
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase)
            for buffer in module.buffers(recurse=False)
        ]

    @torch.no_grad()
    def clear(self) -> None:
        """Restore all of it."""
        for attributes, before in self._attributes:
            for name in [name for name in attributes if name not in _NOT_OURS and name not in before]:
                del attributes[name]
            attributes.update(before)
        for container, held in self._inside:
            if not _same(container, held):
                container.clear()
                container.extend(held) if isinstance(container, list) else container.update(held)
        for buffer, value in self._statistics:
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _NOT_OURS}


def _containers(value: Any, homes: set[str], seen: set[int], depth: int) -> Iterator[Container]:
    if type(value).__module__ in homes and not isinstance(value, nn.Module | Tensor):
        value = getattr(value, "__dict__", None)
    if not isinstance(value, dict | list | set) or id(value) in seen or not depth:
        return
    seen.add(id(value))
    yield value
    for member in value.values() if isinstance(value, dict) else value:
        yield from _containers(member, homes, seen, depth - 1)


def _same(container: Container, held: Container) -> bool:
    """True if both hold the same objects in the same order."""
    pairs = [box.items() if isinstance(box, dict) else ((None, item) for item in box) for box in (container, held)]
    return len(container) == len(held) and all(
        key is other_key and item is other for (key, item), (other_key, other) in zip(*pairs, strict=True)
    )


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[Leftovers]:
    """Eval mode with all gradients on; restores `requires_grad`, `.grad`, modes, random states and caches afterwards.

    Yields the snapshot that resets modules to their state before the first forward pass.
    """
    kept = Leftovers(model)
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p, _, _ in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            for parameter, _, _ in parameters:
                parameter.grad = None
                if can_train(parameter):
                    parameter.requires_grad_(True)
            model.train()  # what computes once for all of eval mode forgets it here
            model.eval()
            for module in model.modules():
                if isinstance(module, nn.RNNBase):  # cuDNN has no backward pass in eval mode
                    module.training, module.dropout = True, 0.0
            yield Leftovers(model)
        finally:
            reshard(model)
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            kept.clear()
            for module, training in modes:
                module.training = training
            random.setstate(python_state)
            np.random.set_state(numpy_state)
