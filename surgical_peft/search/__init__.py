"""Searches for the best blocks: a procedure proposes, workers that share a study train."""

from __future__ import annotations

from .result import SearchResult
from .run import run_search

__all__ = ["SearchResult", "run_search"]
