"""Answers as SQuAD compares them.

Source: the evaluation script of SQuAD v1.1, Rajpurkar et al. 2016 (arXiv 1606.05250), which the Hub has as `squad`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(answer: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and articles.

    Example:
        >>> words_of("The U.S. Army")
        ['us', 'army']
    """
    return re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split()


def overlap(answer: str, reference: str) -> float:
    """The F1 of the words of an answer, 0 to 1."""
    words, wanted = words_of(answer), words_of(reference)
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0


def is_same(answer: str, reference: str) -> float:
    """1 where the words are the same, else 0."""
    return float(words_of(answer) == words_of(reference))


def mean_of_best(
    compare: Callable[[str, str], float], answers: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """The mean over the answers of how each compares with the nearest of its references."""
    pairs = zip(answers, references, strict=True)
    return sum(max(compare(answer, each) for each in known) for answer, known in pairs) / len(references)
