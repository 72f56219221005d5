"""The one exception of the package, and the reason that a foreign one gives."""

from __future__ import annotations


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
