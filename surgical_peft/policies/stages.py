"""Stages: one selection after the other, each with its rate, its length and its loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from ..errors import SurgicalError
from ..validation import check_choice, check_count, check_number, immutable, nearest, resolve
from .policy import STATE_POLICIES, BlockSpec, Policy, StepLoss, TrainingState


@dataclass(frozen=True, repr=False)
class Stage:
    """One part of a training.

    Attributes:
        blocks: what is trained, as [`BlockMap.parse`][surgical_peft.BlockMap.parse] takes it; what else is tuned
            rests.
        epochs, steps: how long; one of the two, or neither for the last stage, which goes on until the end.
        lr_multiplier: factor on the learning rate.
        loss: `(outputs, labels, num_items_in_batch=None) -> loss`, as `Trainer`'s `compute_loss_func`, or its name
            `"package.module:name"`; None = the model's own.

    Raises:
        SurgicalError: a length or a factor out of range, two lengths, or a loss that is no function.

    Example:
        >>> Stage("head", epochs=2, lr_multiplier=10)
        Stage(blocks='head', epochs=2, lr_multiplier=10)
    """

    blocks: BlockSpec = "all"
    epochs: int | None = None
    steps: int | None = None
    lr_multiplier: float = 1.0
    loss: StepLoss | str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", immutable(self.blocks))
        for name in ("epochs", "steps"):
            if getattr(self, name) is not None:
                check_count("a stage", name, getattr(self, name), name)
        if self.epochs and self.steps:
            raise SurgicalError(f"{self} has epochs and steps: give one of the two.")
        rule = "what rests is left out of `blocks`; else a finite number"
        check_number("a stage", "lr_multiplier", self.lr_multiplier, rule, above=0)
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", resolve(self.loss, _LOSSES))
        if self.loss is not None and not callable(self.loss):
            raise SurgicalError(
                f"loss={self.loss!r} of a stage is not a function of (outputs, labels, num_items_in_batch)."
            )

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)
        settings = (f"{name}={_name_of(value) if name == 'loss' else repr(value)}" for name, value in given)
        return f"Stage({', '.join(settings)})"


def stages(plan: Iterable[Stage | Mapping[str, Any]], hard: bool = True, state_policy: str = "reset") -> Stages:
    """Train in stages: each its blocks, rate, length and loss.

    Lengths in epochs need `SurgicalCallback` among the Trainer's callbacks. A stage's loss is computed on what the
    model returns and takes the place of its own while training; evaluation is left alone. The model must be given its
    labels: with `Trainer(compute_loss_func=...)` or label smoothing it is not, and that is an error.

    Args:
        plan: the stages in turn, as `Stage` or as a mapping of its fields (as in a recipe).
        hard: freeze what a stage does not train; False = rate 0 only, which saves nothing and works under DDP.
        state_policy: what freezing does to the optimizer's state: `"reset"`, `"keep"` or `"offload"`.

    Source: one frame for LP-FT (arXiv 2202.10054, see `lp_ft`), two-stage fine-tuning (arXiv 2207.10858, see
    `two_stage`), and schedules of your own.

    Example:
        >>> policy = policies.stages([Stage("head", epochs=1, lr_multiplier=10), Stage([-1, "head"], epochs=2)])
        >>> optimizer = surgical_optimizer(args, policy=policy)
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=optimizer, callbacks=[SurgicalCallback()])
    """
    return Stages(tuple(map(_stage, plan)), hard, state_policy)


@dataclass(frozen=True)
class Stages(Policy):
    """The policy that [`stages`][surgical_peft.policies.stages] returns, with the stages checked."""

    stages: tuple[Stage, ...]
    hard: bool = True
    state_policy: str = "reset"

    def __post_init__(self) -> None:
        check_choice("stages", "state_policy", self.state_policy, STATE_POLICIES)
        if not self.stages:
            raise SurgicalError("stages=[] has no stage: give at least one.")
        for number, stage in enumerate(self.stages, 1):
            if stage.epochs is None and stage.steps is None and stage is not self.stages[-1]:
                raise SurgicalError(f"stage {number} ({stage}) needs its length: epochs or steps, one of the two.")
        if len({stage.epochs is None for stage in self.stages if stage.epochs or stage.steps}) > 1:
            raise SurgicalError("stages are measured in epochs or in steps: the same for all.")

    @property
    def by_epoch(self) -> bool:
        return any(stage.epochs for stage in self.stages)

    @property
    def own_loss(self) -> bool:
        return any(stage.loss for stage in self.stages)

    def last_turn(self) -> tuple[int, int]:
        """After how many epochs, or steps, the last stage begins."""
        before = self.stages[:-1]
        return sum(stage.epochs or 0 for stage in before), sum(stage.steps or 0 for stage in before)

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        if training.step == 0:  # a wrong name in the last stage is an error now, not when its turn comes
            for stage in self.stages:
                _trained(stage, training)
        stage = self.stages[self._number(training)]
        return {
            name: factor * stage.lr_multiplier for name, factor in training.only(_trained(stage, training)).items()
        }

    def loss(self, training: TrainingState) -> StepLoss | None:
        return self.stages[self._number(training)].loss  # type: ignore[return-value]  # Stage resolves names

    def _number(self, training: TrainingState) -> int:
        elapsed = (training.epoch or 0) if self.by_epoch else training.step
        for number, stage in enumerate(self.stages[:-1]):
            elapsed -= stage.epochs or stage.steps or 0
            if elapsed < 0:
                return number
        return len(self.stages) - 1


def check_length(policy: Policy | None, epochs: float, steps: float) -> None:
    """Raise if the training ends before the last stage begins.

    Args:
        policy: any; only stages are looked at.
        epochs: how many the training begins.
        steps: how many it has.

    Raises:
        SurgicalError: it is too short.
    """
    if not isinstance(policy, Stages):
        return
    for unit, begins, length in zip(("epochs", "steps"), policy.last_turn(), (epochs, steps), strict=True):
        if begins >= length:
            raise SurgicalError(
                f"stages={list(policy.stages)}: the last one would never be reached: it begins after {begins} {unit}, "
                f"and the training ends with {length:g}. Shorten the stages before it, or train longer."
            )


def planned_length(args: Any) -> tuple[float, float]:
    """Epochs and steps by the training arguments alone; infinite for the one that depends on the data."""
    if args.max_steps > 0:
        return math.inf, args.max_steps
    return math.ceil(args.num_train_epochs), math.inf


def _trained(stage: Stage, training: TrainingState) -> list[str]:
    """The blocks of a stage that are tuned at all; `"all"` are those that are."""
    chosen = training.names if stage.blocks == "all" else training.blocks.parse(stage.blocks)
    missing = [name for name in chosen if name not in training.names]
    if missing:
        raise SurgicalError(
            f"{stage} names {missing[0]!r}, which is not trained. Trained: {', '.join(training.names)}; "
            "'all' means these."
        )
    if set(chosen) <= set(training.blocks.poolers):
        raise SurgicalError(
            f"{stage} trains nothing but the pooler of {training.blocks.model_name} ({', '.join(chosen)}), which is "
            "no head: a loss on the last hidden states does not reach it. Name another block with it, such as [-1, "
            f"{chosen[0]!r}], or load a model with a head for the task."
        )
    return list(chosen)


def _stage(given: Stage | Mapping[str, Any]) -> Stage:
    if isinstance(given, Mapping):
        known = [f.name for f in fields(Stage)]
        for key in given:
            if key not in known:
                raise SurgicalError(
                    f"a stage has no {key!r}: {nearest(str(key), known)}There are: {', '.join(known)}."
                )
        return Stage(**given)
    if not isinstance(given, Stage):
        raise SurgicalError(f"{given!r} is not a stage: give Stage(...) or a mapping of its fields.")
    return given


def _name_of(loss: Any) -> str:
    """Without an address: `package.module:name` of a function, or the text of an object that describes itself."""
    if hasattr(loss, "__qualname__"):
        return f"{loss.__module__}:{loss.__qualname__}"
    if " at 0x" in repr(loss):
        return f"{type(loss).__module__}:{type(loss).__qualname__}"
    return repr(loss)


_LOSSES = ModuleType("losses", "Names of losses: only the user's own, as package.module:name.")
_LOSSES.__all__ = []  # type: ignore[attr-defined]
