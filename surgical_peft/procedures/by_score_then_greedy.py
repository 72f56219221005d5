"""A criterion cuts the candidates, a greedy search chooses among what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..scoring.block_scores import BlockScores
from ..validation import check_count
from .greedy_forward import grow
from .procedure import Blocks, Procedure, Proposals, check_epsilon, check_fits, layers, plain


def by_score_then_greedy(
    scores: BlockScores | Mapping[str, float],
    num_candidates: int,
    num_blocks: int | None = None,
    epsilon: float = 0.01,
    candidates: Blocks | None = None,
) -> Procedure:
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
    check_epsilon("by_score_then_greedy", epsilon, low=0)
    settings = {"scores": values, "num_candidates": num_candidates, "num_blocks": num_blocks}
    settings |= {"epsilon": float(epsilon), "candidates": plain(candidates)}
    return Procedure("by_score_then_greedy", _by_score, settings)


def _by_score(
    blocks: BlockMap,
    scores: Mapping[str, float],
    num_candidates: int,
    num_blocks: int | None,
    epsilon: float,
    candidates: Blocks | None,
) -> Proposals:
    for name in scores:
        if name not in blocks.names:
            raise SurgicalError(
                f"scores have {name!r}, which is no block of {blocks.model_name}; its are {', '.join(blocks.names)}. "
                "Score this model."
            )
    scored = [name for name in layers(blocks, candidates) if name in scores]
    check_fits("by_score_then_greedy", "num_candidates", num_candidates, scored)
    best = sorted(scored, key=lambda name: -scores[name])[:num_candidates]  # stable: of equals the earlier
    return (yield from grow(tuple(name for name in scored if name in best), num_blocks, epsilon))
