"""Constant rates by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..blocks.block_map import BlockMap
from ..validation import check_number
from .policy import Policy


@dataclass(frozen=True)
class Static(Policy):
    """Constant factors on the learning rate, by block; blocks left out have 1.

    Args:
        multipliers: block (anything [`BlockMap.parse`][surgical_peft.BlockMap.parse] takes) -> factor, more than 0. A
            block that is not to be trained is left out of `blocks`, not given 0; one named by two keys is an error.

    Raises:
        SurgicalError: a factor that is no finite number above 0.

    Example:
        >>> policy = policies.static({"0:4": 0.1, "head": 10})
    """

    multipliers: Mapping[int | str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", dict(self.multipliers or {}))
        for spec, factor in self.multipliers.items():
            check_number("static", f"multipliers[{spec!r}]", factor, above=0)

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        factors = [(block, factor) for spec, factor in self.multipliers.items() for block in blocks.parse(spec)]
        if factors:
            blocks.parse([block for block, _ in factors])  # refuses a block that two keys name
        return dict(factors)
