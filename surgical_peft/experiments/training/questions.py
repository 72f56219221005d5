"""The question that each command answers, how sure the answer is, and which one to trust where they differ."""

from __future__ import annotations

import math

QUESTIONS = {
    "score": "Question answered: which blocks look worth tuning, before any of them is trained to the end? A guess, "
    "and another draw of batches may order near ones differently. Where advise, search or compare differ, trust them.",
    "search": "Question answered: which blocks are best on validation data, each candidate trained to the end? Trust "
    "it over score and advise. The best of many owes something to luck: where compare differs (test data), trust it.",
    "advise": "Question answered: is there a way of tuning worth its cost here, judged by short trainings on "
    "validation data? Trust it over score; where search or compare differ, which train to the end, trust them.",
    "compare": "Question answered: which method is best on test data, each at its best rate? Where other commands "
    "differ, trust this one, as far as its interval is clear of zero.",
    "train": "Question answered: what does this one training reach? Whether other blocks or another rate would do "
    "better it does not tell: advise asks that in short, compare in full.",
}


def standard_error(share: float, count: int) -> float:
    """The standard error of a share, such as an accuracy, that was measured on so many examples.

    Of the share with two successes and two failures added (Agresti and Coull 1998, "Approximate is better than
    'exact'"), so that it is not 0 where all went well.

    Example:
        >>> round(standard_error(0.9, 100), 3)
        0.031
    """
    added = (share * count + 2) / (count + 4)
    return math.sqrt(added * (1 - added) / (count + 4))


def noise(share: float, count: int, split: str) -> str:
    """How sure a share is that was measured once, in words."""
    return (
        f"{100 * share:.1f} % is measured on {count:,} {split} examples: on others of their kind it may be "
        f"±\u00a0{100 * standard_error(share, count):.1f}\u00a0points (one standard error)."
    )
