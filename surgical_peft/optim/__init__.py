"""Learning rates and masks by block, in `Trainer` and any other loop."""

from __future__ import annotations

from .callback import SurgicalCallback
from .optimizer import SurgicalOptimizerFactory, create_surgical_optimizer, surgical_optimizer

__all__ = ["SurgicalCallback", "SurgicalOptimizerFactory", "create_surgical_optimizer", "surgical_optimizer"]
