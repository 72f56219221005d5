"""What scores a block: one function a file, `(weights, grads) -> float`, larger = tune it.

A criterion is called for every unit (block, module or tensor) and every batch, with the unit's weights and the
gradients of that batch's loss in the same order; a weight that got no gradient comes with zeros. Its values are
averaged over the batches.
"""

from __future__ import annotations

from .rgn import rgn

__all__ = ["rgn"]
