"""Which parameters form which block; torch only."""

from __future__ import annotations

from .block_map import BlockMap

__all__ = ["BlockMap"]
