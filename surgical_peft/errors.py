"""The one exception of the package, and what its messages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_LONGEST = 4000  # characters of a message


class SurgicalError(ValueError):
    """Raised for a wrong block, score, recipe or checkpoint.

    The message holds the value given, what is wrong with it, what to do, and what exists. One that a huge value makes
    long is cut in the middle.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > _LONGEST:
            left, right = text[: _LONGEST - 500], text[-400:]
            text = f"{left} ... ({len(text) - len(left) - len(right):,} characters more) ... {right}"
        super().__init__(text)


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
