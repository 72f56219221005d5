"""The one exception of the package, and what its messages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class SurgicalError(ValueError):
    """Raised for a wrong block, score, recipe or checkpoint.

    The message holds the value given, what is wrong with it, what to do, and what exists.
    """


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none.

    Example:
        >>> reason_of(AssertionError())
        'AssertionError'
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def first_of(names: Iterable[Any], most: int = 5) -> str:
    """Names for a message: the first ones, and whether there are more.

    Example:
        >>> first_of(range(9), most=3)
        '0, 1, 2, ...'
    """
    names = list(map(str, names))
    return ", ".join([*names[:most], "..."] if len(names) > most else names)
