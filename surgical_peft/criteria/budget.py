"""The budget of scoring, counted in training steps and not timed: every process and machine counts the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import SurgicalError
from ..validation import check_number

SHARE = 0.5  # of a planned training: the most that choosing its blocks may cost
FORWARD = 1 / 3  # of a training step: a backward pass computes twice as much as a forward pass
# Training steps that the gradients of a batch count as: means and squares of them cost more than an update.
GRADIENTS = 1.25
READING = GRADIENTS - 1  # of which so much for each backward pass, however few examples it is of
_ROUNDING = 1e-6


def _unseen(*args: Any) -> None:
    """Ignore the report."""


@dataclass
class Budget:
    """The limit on what scoring costs and what it has cost so far, in training steps.

    A step is a forward pass, a backward pass and an update of the whole model on one batch. A pass through a part of
    the model counts as that part, by its share of the weights or of the layers, whichever is larger.

    Attributes:
        steps: the limit; infinite if there is none.
        spent: the cost so far.
        held: reserved for later.
        stages: descriptions of the work done, in order.
        on_stage: called with the description of a stage and its cost at most, when it begins.
        on_spend: called with each cost.
    """

    steps: float = math.inf
    spent: float = 0.0
    held: float = 0.0
    stages: list[str] = field(default_factory=list)
    on_stage: Callable[[str, float], None] = _unseen
    on_spend: Callable[[float], None] = _unseen

    @property
    def left(self) -> float:
        """Steps that may still be spent, with room for rounding."""
        return self.steps * (1 + _ROUNDING) - self.held - self.spent

    @property
    def is_given(self) -> bool:
        """True if there is a limit."""
        return self.steps < math.inf

    @contextmanager
    def holding(self, steps: float) -> Iterator[None]:
        """Reserve so many steps for later: the code inside cannot spend them."""
        self.held = steps
        try:
            yield
        finally:
            self.held = 0.0

    def stage(self, words: str, cost: float) -> None:
        """Announce a part of the work, which costs at most `cost`."""
        self.stages.append(words)
        self.on_stage(words, cost)

    def spend(self, cost: float) -> None:
        """Count the cost of the next piece of work.

        Raises:
            SurgicalError: it is more than is left.
        """
        if cost > self.left:
            raise self.too_small(self.spent + cost, "the next step")
        self.spent += cost
        self.on_spend(cost)

    def affordable(self, count: int, cost: float, what: str) -> int:
        """Number of items, up to `count`, that fit into the budget at `cost` each; for one alone also what is held.

        Raises:
            SurgicalError: not even one.
        """
        if cost > self.left:
            self.held = 0.0
        if cost > self.left and count:
            raise self.too_small(self.spent + cost, what)
        return count if not (self.is_given and cost) else min(count, int(self.left / cost))

    def too_small(self, needed: float, what: str) -> SurgicalError:
        """The error that says how many steps it would take."""
        return SurgicalError(
            f"a budget of {self.steps:.4g} training steps is too small to choose blocks by: {what} would make it "
            f"{needed:.4g}. Give at least that, plan for {math.ceil(needed / SHARE)} training steps or more (half is "
            "the budget), or name the blocks."
        )


def check_steps(name: str, value: Any) -> float:
    """Return `value` as a number of training steps.

    Raises:
        SurgicalError: not a finite number above 0.
    """
    check_number("the budget", name, value, "training steps (leave it out for no limit), a finite number", above=0)
    return float(value)


def half_of(steps: Any) -> float:
    """The budget for choosing blocks before a training of so many steps.

    Raises:
        SurgicalError: not a finite number above 0.
    """
    return SHARE * check_steps("steps", steps)
