"""Criteria, which score blocks: one function a file, larger = tune it.

The simplest criterion is a function `(weights, grads) -> float`. It is called for every unit (block, module or tensor)
and every batch, with the unit's weights and the gradients of that batch's loss in the same order; a weight that got no
gradient comes with zeros. Its values are averaged over the batches. What a criterion may ask for beyond that is in
`criteria.criterion`: moments of the gradients over batches or single examples, or the whole model.
"""

from __future__ import annotations

from .adam_gain import adam_gain
from .angle import angle
from .bvr import bvr
from .cka import cka
from .depth import depth
from .depth_gain import depth_gain
from .eb import eb
from .fisher import fisher
from .grad_norm import grad_norm
from .held_out_gain import held_out_gain
from .kappa import kappa
from .middle import middle
from .probe import probe
from .random import random
from .rgn import rgn
from .snr import snr
from .weight_change import weight_change
from .weight_snr import weight_snr

__all__ = [
    "adam_gain",
    "angle",
    "bvr",
    "cka",
    "depth",
    "depth_gain",
    "eb",
    "fisher",
    "grad_norm",
    "held_out_gain",
    "kappa",
    "middle",
    "probe",
    "random",
    "rgn",
    "snr",
    "weight_change",
    "weight_snr",
]
