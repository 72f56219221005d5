"""What a policy is; the optimizer asks it, see `optim`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..blocks import BlockMap
from ..scores import BlockScores


@dataclass(frozen=True)
class Unit:
    """What has a learning rate of its own: a block, or one tensor of it, with the parameters that are trained."""

    name: str
    block: str
    parameters: list[nn.Parameter]


@dataclass(frozen=True)
class Policy:
    """Says the factor on the learning rate of each unit. Holds settings only: its state lives in the optimizer.

    A policy overrides one of the three methods: constant factors, factors from the gradients at hand before every
    step, or factors from scores that `SurgicalCallback` takes at the start of every epoch.

    Attributes:
        granularity: what gets its own rate, `"block"` or `"tensor"`.
        probe_batches: how many training batches to score on at the start of every epoch; 0 = no probe.
    """

    granularity: str = "block"
    probe_batches: int = 0

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        """Constant factors by block, more than 0; blocks left out have 1. They become part of the base rate."""
        return {}

    def step_multipliers(self, units: Sequence[Unit]) -> dict[str, float] | None:
        """Factors for this step by unit, 0 upwards, read off `parameter.grad`; None = as they were.

        Asked before the optimizer steps, so with `step(closure)` the gradients are those of the step before.
        """
        return None

    def multipliers_from(self, scores: BlockScores, units: Sequence[Unit]) -> dict[str, float]:
        """Factors for this epoch by unit, from scores by `rgn` at the policy's granularity."""
        raise NotImplementedError(f"{self} asks for a probe but does not use it")
