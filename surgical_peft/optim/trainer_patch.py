"""Where Trainer itself is changed: a policy's schedule begins with `train()` and ends with it, however it ends.

Callbacks would not do: they may be absent, are not called when a training is interrupted, and get no trainer.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer

from .block_rates import find_rates


def patch_trainer() -> None:
    """Replace `Trainer.train`; a second call changes nothing."""
    original = getattr(Trainer.train, "_surgical_original", Trainer.train)

    @functools.wraps(original)
    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
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
    Trainer.train = train  # type: ignore[method-assign]
