"""Scores blocks by a criterion on batches of the new data, and selects by a rule."""

from __future__ import annotations

from .block_scores import BlockScores
from .score import score_blocks
from .selection import Selection, above, top_fraction, top_k, within_budget

__all__ = ["BlockScores", "Selection", "above", "score_blocks", "top_fraction", "top_k", "within_budget"]
