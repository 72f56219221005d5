"""The frozen start of a model runs once for each example, and not at every step of a training."""

from .attach import cache_prefix
from .cache import PrefixCache

__all__ = ["PrefixCache", "cache_prefix"]
