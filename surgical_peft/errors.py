"""The one exception of the package."""


class SurgicalError(ValueError):
    """Raised for a wrong block, score, recipe or checkpoint.

    The message holds the value given, what is wrong with it, what to do, and what exists.
    """
