"""Shifts of text: how it is typed."""

from __future__ import annotations

from numpy.random import Generator

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def character_noise(text: str, rate: float, rng: Generator) -> str:
    """Characters replaced by random letters, left out or doubled, a third of the noise each.

    Args:
        text: what to change.
        rate: percent of the characters, 0 to 100.
        rng: where the noise comes from.

    Example:
        >>> character_noise("free money", 40, np.random.default_rng(0))
        'hreemmoaeyy'
    """
    share = rate / 100
    kinds = rng.choice(4, size=len(text), p=[1 - share, *[share / 3] * 3])
    random = rng.choice(list(LETTERS), size=len(text))
    made = {0: lambda old, new: old, 1: lambda old, new: new, 2: lambda old, new: "", 3: lambda old, new: old + old}
    return "".join(made[kind](old, new) for kind, old, new in zip(kinds.tolist(), text, random, strict=True))


def casing(text: str, rate: float, rng: Generator) -> str:
    """Letters in the other case, upper for lower and lower for upper.

    Args:
        text: what to change.
        rate: percent of the characters, 0 to 100.
        rng: where the choice comes from.

    Example:
        >>> casing("Free money", 100, np.random.default_rng(0))
        'fREE MONEY'
    """
    swapped = rng.random(len(text)) < rate / 100
    return "".join(char.swapcase() if swap else char for char, swap in zip(text, swapped.tolist(), strict=True))
