"""Rules that turn scores into a selection, without a look at the model or the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from ..blocks.block_map import blocks_in_words
from ..errors import SurgicalError
from ..validation import check_count, check_number
from .block_scores import BlockScores, normalize


@dataclass(frozen=True)
class Selection:
    """Blocks to tune, in the model's order; plain data, equal by all but the record.

    Attributes:
        blocks: the chosen block names.
        record: how they were chosen (rule, criterion, batches, scores): kept in `adapter_config.json`, never read.
        layer_paths: those of the `BlockMap` that the names are of.
    """

    blocks: tuple[str, ...]
    record: dict[str, Any] = field(default_factory=dict, compare=False)
    layer_paths: tuple[str, ...] = ()


def top_k(scores: BlockScores, k: int) -> Selection:
    """The `k` highest-scoring blocks; of equals the earlier block wins. Warns of those that score below zero.

    Raises:
        SurgicalError: `k` is not between 1 and the number of blocks, or the scores are not of blocks.

    Example:
        >>> top_k(scores, 2).blocks
        ('embeddings', 'head')
    """
    chosen = best(scores, k)
    if below := [name for name in chosen.blocks if scores.values[name] < 0]:
        warnings.warn(
            f"top_k takes {blocks_in_words(below)} with a {scores.criterion} score below zero: the least bad, which "
            "may be worth nothing. Take fewer blocks, or score on more batches.",
            stacklevel=2,
        )
    return chosen


def best(scores: BlockScores, k: int) -> Selection:
    """As `top_k`, without a warning."""
    check_count("top_k", "k", k, "of the scored blocks", at_most=len(scores.values))
    return _selection(scores, _ranked(scores)[:k], rule="top_k", k=k)


def top_fraction(scores: BlockScores, fraction: float) -> Selection:
    """The highest-scoring `fraction` of the blocks (0 to 1), rounded to the nearest number and at least one block.

    Example:
        >>> len(top_fraction(scores, 0.25).blocks)
        2
    """
    check_number("top_fraction", "fraction", fraction, above=0, at_most=1)
    count = max(1, round(fraction * len(scores.values)))
    return _selection(scores, _ranked(scores)[:count], rule="top_fraction", fraction=fraction)


def above(scores: BlockScores, threshold: float, normalized: str | None = None) -> Selection:
    """The blocks that score more than `threshold`; raw scores, or divided as `normalized` (`"max"`, `"minmax"`) says.

    Here the head is normalized with the others: a threshold compares blocks, it scales no learning rate.

    Raises:
        SurgicalError: no block is above; the message gives the highest score.

    Example:
        >>> above(scores, 0.5, normalized="max").blocks
        ('head',)
    """
    values = normalize(scores.values, normalized) if normalized else scores.values
    chosen = [name for name, value in values.items() if value > threshold]
    if not chosen:
        raise SurgicalError(
            f"no block scores above {threshold}: the highest is {max(values.values()):.4g}. Lower the threshold."
        )
    return _selection(scores, chosen, rule="above", threshold=threshold, normalized=normalized)


def within_budget(scores: BlockScores, max_parameters: int) -> Selection:
    """Blocks in the order of their scores, each taken if all taken so far stay within `max_parameters` together.

    Raises:
        SurgicalError: not even the smallest block fits.

    Example:
        >>> sum(scores.sizes[name] for name in within_budget(scores, 100_000).blocks) <= 100_000
        True
    """
    chosen: list[str] = []
    spent = 0
    for name in _ranked(scores):
        if spent + scores.sizes[name] <= max_parameters:
            chosen.append(name)
            spent += scores.sizes[name]
    if not chosen:
        smallest = min(scores.sizes, key=scores.sizes.__getitem__)
        raise SurgicalError(
            f"max_parameters={max_parameters} fits no block: the smallest is {smallest!r}, {scores.sizes[smallest]}."
        )
    return _selection(scores, chosen, rule="within_budget", max_parameters=max_parameters)


def _ranked(scores: BlockScores) -> list[str]:
    return sorted(scores.values, key=lambda name: -scores.values[name])  # stable: of equals the earlier stays first


def _selection(scores: BlockScores, chosen: list[str], **how: Any) -> Selection:
    if scores.granularity != "block":
        raise SurgicalError(
            f"these are scores of {scores.granularity}s, and a selection is made of blocks: use granularity='block'."
        )
    record = {
        **how,
        "criterion": scores.criterion,
        "num_batches": scores.num_batches,
        "scores": dict(scores.values),
    }
    return Selection(tuple(name for name in scores.values if name in chosen), record, scores.layer_paths)
