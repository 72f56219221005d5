"""Methods of a comparison: one function each, which returns a `Method`.

`methods.method` says what a method is and what one of your own has to give.
"""

from __future__ import annotations

from .by_policy import auto_rgn, auto_rgn_paper, bvg_ls, layer_decay, lp_ft, policy
from .chosen import auto, searched, top_k
from .depth import blocks, first, head, last, middle, random_k
from .method import Method as Method
from .method import MethodContext as MethodContext
from .method import make_method as make_method
from .parts import lora, modules_to_save, norms
from .whole import full, nothing

__all__ = [
    "auto",
    "auto_rgn",
    "auto_rgn_paper",
    "blocks",
    "bvg_ls",
    "first",
    "full",
    "head",
    "last",
    "layer_decay",
    "lora",
    "lp_ft",
    "middle",
    "modules_to_save",
    "norms",
    "nothing",
    "policy",
    "random_k",
    "searched",
    "top_k",
]
