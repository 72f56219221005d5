"""Warns when an optimizer without masters steps on tuned 16-bit weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .master_weights import coarse_places, rounds_stochastically


def tell_of_others(weights: Iterable[Tensor]) -> None:
    """Warn, once, when an optimizer without masters steps on one of these weights while it is 16-bit."""
    global _watching
    _tuned.update((weight, None) for weight in weights)
    if _tuned and _watching is None:
        _watching = register_optimizer_step_pre_hook(_look)


_tuned: WeakIdKeyDictionary = WeakIdKeyDictionary()
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_watching: Any = None
_told = False


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _told
    if _told or optimizer in _seen:
        return
    _seen.add(optimizer)
    weight = next((weight for _, _, weight in coarse_places(optimizer) if weight in _tuned), None)
    if weight is None or hasattr(optimizer, "block_rates") or rounds_stochastically(optimizer):
        return
    _told = True
    warnings.warn(
        f"{type(optimizer).__name__} steps on {str(weight.dtype).removeprefix('torch.')} weights, where small steps "
        "vanish in rounding. Train with create_surgical_optimizer(model, torch.optim.AdamW, lr=...), or with "
        "Trainer(optimizer_cls_and_kwargs=surgical_optimizer(args)), which keep 32-bit masters of what is tuned, or "
        "load the model with dtype=torch.float32.",
        stacklevel=4,
    )
