"""The base class of policies; `optim.block_rates` applies what they return."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..scoring.block_scores import BlockScores

BlockSpec = int | str | Sequence[int | str]  # as `BlockMap.parse` takes it
StepLoss = Callable[..., Tensor]

STATE_POLICIES = ("keep", "reset", "offload")
GRAIN = 2**15  # numbers: fewer, torch copies and sums on the spot, without waking its other threads


@dataclass(frozen=True)
class Unit:
    """A group with one learning rate: a block or a single tensor of it, with its trainable parameters.

    Attributes:
        name: the key of its factor: the block's name, or with `granularity="tensor"` the tensor's.
        block: the name of its block.
        parameters: what it trains; after the backward pass `parameter.grad` holds the gradient, or None.
    """

    name: str
    block: str
    parameters: list[nn.Parameter]

    @cached_property
    def size(self) -> int:
        """How many numbers it has."""
        return sum(parameter.numel() for parameter in self.parameters)

    @cached_property
    def runs(self) -> list[list[nn.Parameter]]:
        """The parameters in runs of fewer than `GRAIN` numbers; a parameter of more is a run of its own."""
        runs: list[list[nn.Parameter]] = []
        room = 0
        for parameter in self.parameters:
            room -= parameter.numel()
            if room <= 0:
                runs.append([])
                room = GRAIN - parameter.numel()
            runs[-1].append(parameter)
        return runs


@dataclass(frozen=True)
class TrainingState:
    """The training as a policy sees it.

    Attributes:
        units: everything that may be trained, in the model's order.
        blocks: the model's block map.
        step: optimizer steps done.
        epoch: epochs done, from 0, as `SurgicalCallback` tells it; None in a loop of your own.
        state: what the policy keeps from step to step: numbers, strings, tensors, lists and dicts of them. It is saved
            and loaded with the optimizer's state; whatever is not in here is lost when a run is resumed.
        scores: what the policy found out about the units; only for the log.
    """

    units: Sequence[Unit]
    blocks: BlockMap
    step: int = 0
    epoch: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The blocks that may be trained, first one first."""
        return list(dict.fromkeys(unit.block for unit in self.units))

    @property
    def heads(self) -> list[str]:
        """Those of them that are heads."""
        return [name for name in self.names if name in self.blocks.heads]

    @property
    def repeated(self) -> list[str]:
        """Those of them that are repeated layers."""
        return [name for name in self.names if name in self.blocks.layers]

    def only(self, chosen: Iterable[str]) -> dict[str, float]:
        """Factor 1 for the units of the chosen blocks, 0 for all others."""
        chosen = set(chosen)
        return {unit.name: float(unit.block in chosen) for unit in self.units}


@dataclass(frozen=True)
class Policy:
    """Sets the factor on the learning rate of each unit. Holds settings only: its state is `training.state`.

    A policy is a frozen dataclass: its fields are its settings, checked in `__post_init__`. It overrides one or more
    of the methods, and what differs of the attributes: each as a class attribute, a field with a default, or a
    property. Its text (`str`) must say all its settings and no addresses, since a checkpoint knows its policy by it.
    Random draws must come from `training.state` or from a seed and `training.step`, never from the global generators.

    Attributes:
        granularity: what gets its own rate, `"block"` or `"tensor"`.
        criterion: what a probe scores by.
        hard: a factor of 0 is a mask: no gradient, no `requires_grad`; else only a rate of 0.
        state_policy: what a mask does to the optimizer's state of its unit: `"keep"`, `"reset"` (drop, so that it
            starts anew) or `"offload"` (to the CPU until it is trained again).

    Example:
        >>> @dataclass(frozen=True)
        ... class Alternating(Policy):
        ...     every: int = 100
        ...     hard: bool = True
        ...
        ...     def plan(self, training):
        ...         heads = training.heads or training.names
        ...         return training.only(heads if training.step // self.every % 2 else training.names)
    """

    granularity = "block"
    criterion = "rgn"
    hard = False
    state_policy = "keep"

    @property
    def probe_batches(self) -> int:
        """How many training batches to score on; 0 = no probe."""
        return 0

    @property
    def probe_every(self) -> str | int:
        """When to probe: at the start of every `"epoch"`, or every so many steps."""
        return "epoch"

    @property
    def reset_at_probe(self) -> bool:
        """If true, each probe drops the optimizer's whole state."""
        return False

    @property
    def by_epoch(self) -> bool:
        """True if the plan depends on `training.epoch`, which needs `SurgicalCallback`."""
        return False

    @property
    def skip_idle(self) -> bool:
        """If true, a factor of 0 from `step_multipliers` also removes the unit's gradient for that step.

        Then its moments stay as they are.
        """
        return False

    @property
    def own_loss(self) -> bool:
        """True if `loss` may return a loss."""
        return False

    @property
    def is_constant(self) -> bool:
        """True if the policy has constant factors only."""
        changing = ("plan", "step_multipliers", "multipliers_from", "loss")
        return all(getattr(type(self), name) is getattr(Policy, name) for name in changing)

    def base_multipliers(self, blocks: BlockMap) -> dict[str, float]:
        """Constant factors by block, more than 0; blocks left out have 1. Asked once, when the optimizer is made."""
        return {}

    def without_effect(self, training: TrainingState) -> str | None:
        """Why it leaves the learning rates of these units as they are; None where it does not. Told once."""
        return None

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        """Factors for the coming step by unit, 0 upwards; None = as they were.

        Asked before the forward pass: when the optimizer is made, after every step, and at the start of every epoch.
        The answer must follow from `training` alone: it may be asked twice.
        """
        return None

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        """Factors for this step by unit, 0 upwards, read off `parameter.grad`; None = as they were.

        Asked before the optimizer steps, so with `step(closure)` the gradients are those of the step before.
        """
        return None

    def multipliers_from(self, scores: BlockScores, training: TrainingState) -> dict[str, float] | None:
        """Factors from now on by unit, from scores by `criterion` at the policy's granularity; None = as they were."""
        raise NotImplementedError(f"{self} asks for a probe but does not use it")

    def loss(self, training: TrainingState) -> StepLoss | None:
        """`(outputs, labels, num_items_in_batch=None) -> loss` for the coming step; None = the model's own."""
        return None


def warn_if_idle(policy: Policy, training: TrainingState, constant: Iterable[float]) -> None:
    """Warn of a policy that leaves all learning rates as they are; `constant` are the constant factors."""
    reason = policy.without_effect(training)
    if policy != Policy() and policy.is_constant and set(constant) == {1.0}:
        reason = "every factor is 1"
    if reason:
        warnings.warn(f"the policy {policy} has no effect on what is tuned: {reason}.", stacklevel=5)


def check_enough(owner: str, num_blocks: int, candidates: Sequence[str]) -> None:
    """Refuse to draw more blocks than there are."""
    if num_blocks > len(candidates):
        raise SurgicalError(
            f"num_blocks={num_blocks} is more than {owner} has to choose from: {len(candidates)} repeated blocks are "
            f"trained ({', '.join(candidates) or 'none'}). Lower it, or tune more blocks."
        )


def kept_on(training: TrainingState, always: BlockSpec | None) -> list[str]:
    """The blocks that a policy always trains: its `always`, by default the heads.

    Raises:
        SurgicalError: a block in `always` that is not trained.
    """
    if always is None:
        return training.heads
    chosen = () if always == () else training.blocks.parse(always)
    missing = [name for name in chosen if name not in training.names]
    if missing:
        raise SurgicalError(
            f"always={always!r} names {missing[0]!r}, which is not trained. Trained: {', '.join(training.names)}."
        )
    return list(chosen)
