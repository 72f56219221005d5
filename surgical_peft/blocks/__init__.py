"""Blocks: the map from a model's parameters to its blocks; torch only."""

from __future__ import annotations

from .block_map import BlockMap

__all__ = ["BlockMap"]
