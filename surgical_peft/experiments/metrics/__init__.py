"""The metrics of recipes: a folder each, with a script that `evaluate` loads without a network.

A script must write each of its imports on a line of its own: `evaluate` reads them before it runs the script.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE

from ...errors import SurgicalError, reason_of
from ...validation import nearest

_FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in _FOLDER.glob("*/*.py")))


def load_metric(name: str) -> Callable[[list[Any], list[Any]], float]:
    """The metric `name` as a function of predictions and references; larger is better.

    Args:
        name: one of those that ship; a folder with a script for `evaluate`; or, where there is a network, one of the
            Hub. Of a metric with several numbers, `name:number`, e.g. `rouge:rougeL`.

    Raises:
        SurgicalError: unknown here and not to be had from the Hub now.

    Example:
        >>> load_metric("accuracy")([0, 1, 1], [0, 1, 0])
        0.6666666666666666
    """
    path, _, key = name.partition(":")
    if path not in SHIPPED:  # those that ship are loaded when they are first needed
        try:
            _module(path)
        except (OSError, ImportError, ValueError) as error:
            if Path(path).exists():
                raise SurgicalError(f"the metric in {path} cannot be loaded: {reason_of(error)}") from error
            raise SurgicalError(
                f"metric {path!r} is unknown: {nearest(path, SHIPPED)}{', '.join(SHIPPED)} ship with us and need no "
                f"network; it is not to be had from the Hub now: {reason_of(error)}"
            ) from error
    return partial(_compute, path, key)


def _compute(path: str, key: str, predictions: list[Any], references: list[Any]) -> float:
    values = _module(path).compute(predictions=predictions, references=references)
    if not isinstance(values, dict):
        raise SurgicalError(
            f"metric {path!r} makes a {type(values).__name__}, not a dictionary: have _compute return one."
        )
    chosen = key or (path if path in values else next(iter(values)) if len(values) == 1 else "")
    value = values.get(chosen)
    if not isinstance(value, Real):
        numbers = ", ".join(f"{path}:{name}" for name, number in values.items() if isinstance(number, Real))
        raise SurgicalError(f"metric {f'{path}:{key}' if key else path!r} is no number. Write one of: {numbers}.")
    return float(value)


@lru_cache
def _module(path: str) -> Any:
    import evaluate  # here, because it takes most of a second

    if HF_HUB_OFFLINE:
        evaluate.config.HF_EVALUATE_OFFLINE = True
    # In memory, because the files it writes else are shared by all processes.
    return evaluate.load(str(_FOLDER / path) if path in SHIPPED else path, keep_in_memory=True)
