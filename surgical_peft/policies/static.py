"""Constant rates by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from .policy import Policy, is_number


def static(multipliers: Mapping[int | str, float] | None = None) -> Policy:
    """Constant factors on the learning rate, by block; blocks left out have 1.

    Args:
        multipliers: block (anything [`BlockMap.parse`][surgical_peft.BlockMap.parse] takes) -> factor, more than 0. A
            block that is not to be trained is left out of `blocks`, not given 0; one named by two keys is an error.

    Raises:
        SurgicalError: a factor that is no number.

    Example:
        >>> policy = policies.static({"0:4": 0.1, "head": 10})
    """
    for spec, factor in (multipliers or {}).items():
        if not is_number(factor):
            raise SurgicalError(f"multipliers={multipliers}: the factor of {spec!r} is no number: it must be above 0.")
    return Static(given=tuple((multipliers or {}).items()))


@dataclass(frozen=True)
class Static(Policy):
    given: tuple[tuple[int | str, float], ...] = ()

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        factors = [(block, factor) for spec, factor in self.given for block in blocks.parse(spec)]
        if factors:
            blocks.parse([block for block, _ in factors])  # refuses a block that two keys name
        return dict(factors)
