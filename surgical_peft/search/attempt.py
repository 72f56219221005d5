"""One training of a search: its metric, or why it has none."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import SurgicalError, machine_fault, reason_of
from ..scoring.selection import Selection
from .result import SearchTrial

if TYPE_CHECKING:
    from .study import Task

_log = logging.getLogger(__name__)


def attempt(
    task: Task, objective: Callable[..., float], origin: Selection, report: Callable[[float, int], None] | None
) -> SearchTrial:
    """Train one candidate at one rate and seed.

    Raises:
        SurgicalError: the training fails for the machine's sake: a disk, a network, a lack of memory.
    """
    from optuna import TrialPruned

    settings: dict[str, Any] = {
        key: value for key, value in (("rate", task.rate), ("seed", task.seed)) if value is not None
    }
    selection = replace(origin, blocks=task.blocks, record={**origin.record, **settings})
    given = set(selection.record)
    metric, error, state = math.nan, None, "complete"
    began = time.perf_counter()
    try:
        metric = float(objective(selection, **settings, **({"report": report} if report else {})))
        if not math.isfinite(metric):
            metric, error, state = math.nan, f"the objective gave {metric}", "failed"
    except TrialPruned as pruned:
        error, state = str(pruned) or "pruned by the objective", "pruned"
    except Exception as failure:
        if remedy := machine_fault(failure):
            raise SurgicalError(
                f"blocks {list(task.blocks)}: {type(failure).__name__}: {reason_of(failure)}. That is of the machine, "
                f"not of the blocks, so no result of theirs is kept: {remedy}; then run the same again. Finished "
                "trials are kept."
            ) from failure
        state = "failed"
        error = f"{type(failure).__name__}: {failure}"
        _log.warning("blocks %s failed", list(task.blocks), exc_info=True)
    return SearchTrial(
        blocks=task.blocks,
        metric=metric,
        seconds=time.perf_counter() - began,
        state=state,
        rate=task.rate,
        seed=task.seed,
        error=error,
        notes={key: value for key, value in selection.record.items() if key not in given},
    )
