"""A criterion cuts the candidates, a greedy search chooses among what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..scoring.block_scores import BlockScores
from ..validation import check_count, check_number
from .greedy_forward import grow
from .procedure import Blocks, Proposals, check_fits, layers, procedure


def _check(
    scores: BlockScores | Mapping[str, float], num_candidates: int, num_blocks: int | None, epsilon: float, **_: Any
) -> dict[str, Any]:
    if isinstance(scores, BlockScores) and scores.granularity != "block":
        raise SurgicalError(f"these are scores of {scores.granularity}s: score with granularity='block'.")
    given = scores.values if isinstance(scores, BlockScores) else scores
    values = {name: float(value) for name, value in given.items()}
    wrong = ", ".join(f"{name} ({value})" for name, value in values.items() if not math.isfinite(value))
    if wrong:
        raise SurgicalError(f"scores that are NaN or infinite cannot be ranked: {wrong}.")
    check_count("by_score_then_greedy", "num_candidates", num_candidates, "blocks to choose from")
    if num_blocks is not None:
        check_count("by_score_then_greedy", "num_blocks", num_blocks, "blocks at most")
        if num_blocks > num_candidates:
            raise SurgicalError(f"num_blocks={num_blocks} is more than num_candidates={num_candidates}: lower it.")
    check_number("by_score_then_greedy", "epsilon", epsilon, "in the unit of the metric, a number", at_least=0)
    return {"scores": values, "epsilon": float(epsilon)}


@procedure(_check)
def by_score_then_greedy(
    blocks: BlockMap,
    scores: BlockScores | Mapping[str, float],
    num_candidates: int,
    num_blocks: int | None = None,
    epsilon: float = 0.01,
    candidates: Blocks | None = None,
) -> Proposals:
    """`greedy_forward` among the `num_candidates` blocks with the highest scores; of equals the earlier block.

    The scores are given, so the search itself needs no data for them. Only blocks that have a score take part.

    Args:
        scores: what `score_blocks` found, by block, or a score for each block name; larger = tune it.
        num_candidates: blocks that the scores leave to choose from.
        num_blocks: as for `greedy_forward`.
        epsilon: as for `greedy_forward`.
        candidates: the blocks to rank by score, as `BlockMap.parse` takes them; default the repeated layers, since
            the head would come first by most criteria whatever the data.

    Trainings: those of `greedy_forward` for L = `num_candidates`.

    Source: ours; greedy selection of SubTuning (Kaplun et al. 2023, arXiv 2302.06354) at a price that does not grow
    with the model.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="rgn")
        >>> result = run_search(procedures.by_score_then_greedy(scores, num_candidates=4), objective)
    """
    values: Mapping[str, float] = scores  # type: ignore[assignment]  # `_check` made them so
    for name in values:
        if name not in blocks.names:
            raise SurgicalError(
                f"scores have {name!r}, which is no block of {blocks.model_name}; its are {', '.join(blocks.names)}. "
                "Score this model."
            )
    scored = [name for name in layers(blocks, candidates) if name in values]
    check_fits("by_score_then_greedy", "num_candidates", num_candidates, scored)
    best = sorted(scored, key=lambda name: -values[name])[:num_candidates]  # stable: of equals the earlier
    return (yield from grow(tuple(name for name in scored if name in best), num_blocks, epsilon))
