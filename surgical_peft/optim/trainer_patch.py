"""Patches Trainer so that a policy's schedule begins and ends with the training, however it ends.

Callbacks would not do: they may be absent, are not called when a training is interrupted, and get no trainer. Ours is
told its trainer here, by whose loss it scores.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from .block_rates import find_rates
from .callback import SurgicalCallback

# Within one `train()`, Trainer begins the loop again when the memory does not do for its batches.
_TRAININGS = ("train", "_inner_training_loop")


def patch_trainer() -> None:
    """Wrap what trains in Trainer and in its subclasses, also in those to come; a second call changes nothing."""
    known = [Trainer]
    for cls in known:
        _wrap(cls)
        known += cls.__subclasses__()
    Trainer.__init_subclass__ = classmethod(_begin_subclass)  # type: ignore[assignment]


def _begin_subclass(cls: type[Trainer], **kwargs: Any) -> None:
    super(Trainer, cls).__init_subclass__(**kwargs)
    _wrap(cls)


def _wrap(cls: type[Trainer]) -> None:
    for name in _TRAININGS:
        if not hasattr(getattr(cls, name), "_surgical_original"):
            setattr(cls, name, _bounded(getattr(cls, name)))


def _bounded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SurgicalCallback):
                callback.trainer = weakref.ref(self)
        optimizer, rates = find_rates(self.optimizer)
        if rates is not None and not rates.active:
            rates.restart(optimizer)
        try:
            return original(self, *args, **kwargs)
        finally:
            _, rates = find_rates(self.optimizer)
            if rates is not None:
                rates.release()

    train._surgical_original = original  # type: ignore[attr-defined]
    return train
