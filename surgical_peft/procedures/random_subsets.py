"""Chance, the control of every search."""

from __future__ import annotations

import math
import random
from typing import Any

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..validation import check_count
from .procedure import Blocks, Candidate, Proposals, check_fits, layers, procedure


def _check(num_blocks: int, num_trials: int, seed: int, **_: Any) -> None:
    check_count("random_subsets", "num_blocks", num_blocks, "blocks in a set")
    check_count("random_subsets", "num_trials", num_trials, "sets")
    check_count("random_subsets", "seed", seed, "of the draws", at_least=-math.inf)


@procedure(_check)
def random_subsets(
    blocks: BlockMap, num_blocks: int, num_trials: int, seed: int = 0, candidates: Blocks | None = None
) -> Proposals:
    """So many different sets of `num_blocks` blocks by chance, all equally likely: the control of any other choice.

    All in one round. Sets of equally many blocks hold equally many parameters only where the blocks are of one size,
    as the repeated layers of most transformers are.

    Args:
        num_blocks: blocks in a set, at least 1.
        num_trials: sets, no two alike.
        seed: of the draws.
        candidates: the blocks to draw from, as `BlockMap.parse` takes them; default the repeated layers.

    Trainings: `num_trials`.

    Source: the control that a choice of blocks is worth something only if it beats: as many blocks by chance.

    Example:
        >>> result = run_search(procedures.random_subsets(num_blocks=2, num_trials=10), objective)
    """
    names = layers(blocks, candidates)
    check_fits("random_subsets", "num_blocks", num_blocks, names)
    count = math.comb(len(names), num_blocks)
    if num_trials > count:
        raise SurgicalError(
            f"num_trials={num_trials} is more than there are: {count} sets of {num_blocks} of {len(names)} blocks."
        )
    chance = random.Random(seed)
    drawn: dict[Candidate, None] = {}
    while len(drawn) < num_trials:
        numbers = sorted(chance.sample(range(len(names)), num_blocks))
        drawn[tuple(names[number] for number in numbers)] = None
    yield list(drawn)
    return None
