"""Search procedures, one a file: each a generator that proposes blocks to train and receives their metrics.

`procedures.procedure` says what a procedure is and what one of the user's own has to do.
"""

from __future__ import annotations

from .by_score_then_greedy import by_score_then_greedy
from .contiguous import contiguous
from .cross_val import cross_val
from .greedy_backward import greedy_backward
from .greedy_forward import greedy_forward
from .prefix import prefix
from .procedure import Procedure as Procedure
from .procedure import as_procedure as as_procedure
from .random_subsets import random_subsets
from .segments import segments
from .suffix import suffix
from .sweep import sweep
from .top_k_jointly import top_k_jointly
from .windows import windows

__all__ = [
    "by_score_then_greedy",
    "contiguous",
    "cross_val",
    "greedy_backward",
    "greedy_forward",
    "prefix",
    "random_subsets",
    "segments",
    "suffix",
    "sweep",
    "top_k_jointly",
    "windows",
]
