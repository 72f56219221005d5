"""Learning rates by block: one optimizer factory for `Trainer` and any other loop.

Every (unit, weight decay or not) is a parameter group. Constant factors go into the group's base rate. Changing ones
are applied by a hook just before `optimizer.step` and taken back just after it, so schedulers, clipping and logging
see the rates that they would see without a policy, and nothing depends on `Trainer`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory

from .blocks import BlockMap, clean_name
from .errors import SurgicalError
from .policies.policy import Policy, Unit
from .scoring import score_blocks


def create_surgical_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over the trainable parameters of `model`, a group for each block; for any training loop.

    Args:
        model: bare or wrapped; what has `requires_grad` is trained.
        optimizer_cls: any optimizer that takes parameter groups.
        lr: learning rate; policies multiply it.
        weight_decay: for weights; biases and norms have none, by `Trainer`'s own rule.
        policy: from `policies`; None = the same rate everywhere.
        **kwargs: for `optimizer_cls`.

    Raises:
        SurgicalError: nothing to train, or a factor of the policy that is not a finite number above 0.

    Example:
        >>> optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policies.auto_rgn())
    """
    if policy is not None and not isinstance(policy, Policy):
        raise SurgicalError(f"policy={policy!r} is not a policy: call it first, as in policies.auto_rgn().")
    policy = policy or Policy()
    blocks = BlockMap.find(model)
    base = _checked_base_multipliers(policy, blocks)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # uses no self; one rule
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for block, named in blocks.named_parameters(model).items():
        for name, parameter in named.items():
            if parameter.requires_grad:
                unit = block if policy.granularity == "block" else clean_name(name)
                decays = name in decayed
                group = groups.setdefault((unit, decays), {"params": [], "unit": unit, "block": block})
                group["params"].append(parameter)
                group["lr"] = lr * base.get(block, 1.0)
                group["weight_decay"] = weight_decay if decays else 0.0
                group["lr_multiplier"] = 1.0
    if not groups:
        raise SurgicalError("nothing to train: no parameter of the model has requires_grad. Wrap it with a SurgicalConfig first.")
    # The highest rate first: Trainer logs the rate of the first group.
    ordered = sorted(groups.values(), key=lambda group: -group["lr"])
    optimizer = optimizer_cls(ordered, lr=lr, **kwargs)  # type: ignore[call-arg]
    BlockRates(optimizer, policy)
    return optimizer


class SurgicalOptimizerFactory:
    """Builds the optimizer inside `Trainer`, which calls `SurgicalOptimizerFactory()(model, **kwargs)`.

    `args` is read when called, so `Trainer.hyperparameter_search` over `learning_rate` or `weight_decay` works. Every
    `args.optim` that takes parameter groups does; GaLore, APOLLO and LOMO, which bring their own, are refused.
    """

    def __call__(self, model: nn.Module, *, args: TrainingArguments, policy: Policy | None = None) -> Optimizer:
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
        if is_optimizer_factory(optimizer_cls) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            raise SurgicalError(
                f"optim={str(args.optim)!r} makes its own parameter groups and cannot have a rate for each block: use "
                "one that takes groups, such as 'adamw_torch' or 'sgd'."
            )
        settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **kwargs}
        return create_surgical_optimizer(model, optimizer_cls, policy=policy, **settings)


def surgical_optimizer(
    args: TrainingArguments, policy: Policy | None = None
) -> tuple[type[SurgicalOptimizerFactory], dict[str, Any]]:
    """What to hand to `Trainer(optimizer_cls_and_kwargs=...)` for learning rates by block.

    Example:
        >>> Trainer(model=model, args=args, optimizer_cls_and_kwargs=surgical_optimizer(args, policies.auto_rgn()))
    """
    return SurgicalOptimizerFactory, {"args": args, "policy": policy}


class BlockRates:
    """Applies a policy's factors around each step of one optimizer, and keeps its state in the optimizer's own."""

    def __init__(self, optimizer: Optimizer, policy: Policy) -> None:
        self.policy = policy
        self.probed_epoch: int | None = None
        self._rates: list[Any] = []
        self.units = _units_of(optimizer)
        optimizer.block_rates = self  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._check_loaded)

    def set_multipliers(self, optimizer: Optimizer, multipliers: dict[str, float]) -> None:
        """Use these factors, by unit, from the next step on.

        Raises:
            SurgicalError: a factor that is negative or not finite; the rates stay as they were.
        """
        for unit, factor in multipliers.items():
            if not (math.isfinite(factor) and factor >= 0):
                raise SurgicalError(f"{self.policy} gives {unit!r} the factor {factor}: it must be a number from 0 upwards.")
        for group in optimizer.param_groups:
            group["lr_multiplier"] = multipliers.get(group["unit"], group["lr_multiplier"])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.policy.probe_batches and self.probed_epoch is None:
            raise SurgicalError(
                f"{self.policy} scores at the start of every epoch and needs data for it: add SurgicalCallback() to "
                "the Trainer's callbacks, or use every='step'."
            )
        if (multipliers := self.policy.step_multipliers(self.units)) is not None:
            self.set_multipliers(optimizer, multipliers)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["lr_multiplier"]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate  # the very object, not a quotient: nothing drifts

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "surgical": {"policy": str(self.policy), "probed_epoch": self.probed_epoch}}

    def _check_loaded(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved = state_dict.get("surgical")
        if saved is None or saved["policy"] != str(self.policy):
            raise SurgicalError(
                f"this checkpoint was trained under {saved['policy'] if saved else 'another optimizer'}, not under "
                f"{self.policy}: resume with the policy that wrote it, or start anew."
            )
        self.probed_epoch = saved["probed_epoch"]


class SurgicalCallback(TrainerCallback):
    """Scores the blocks at the start of every epoch for a policy that asks for it, such as `auto_rgn(every="epoch")`.

    The batches are drawn from the training set by a generator of its own (seed + epoch), so training sees the same
    data in the same order as without it; a run resumed within an epoch does not score that epoch again.

    Example:
        >>> Trainer(..., callbacks=[SurgicalCallback()])
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate wraps it
        rates: BlockRates | None = getattr(optimizer, "block_rates", None)
        if rates is None:
            raise SurgicalError("SurgicalCallback found no surgical optimizer: pass Trainer(optimizer_cls_and_kwargs=surgical_optimizer(args, policy)).")
        epoch = int((state.epoch or 0.0) + 1e-6)
        if not rates.policy.probe_batches or rates.probed_epoch == epoch:
            return
        loader = _probe_loader(kwargs["train_dataloader"], args, epoch)
        policy = rates.policy
        scores = score_blocks(kwargs["model"], loader, "rgn", policy.granularity, policy.probe_batches)
        rates.set_multipliers(optimizer, policy.multipliers_from(scores, rates.units))
        rates.probed_epoch = epoch


def _probe_loader(training: DataLoader, args: TrainingArguments, epoch: int) -> DataLoader:
    """A loader of its own over the training set: half-read, the Trainer's would change the order of what follows."""
    if not isinstance(training.dataset, Dataset) and not hasattr(training.dataset, "__getitem__"):
        raise SurgicalError("scoring every epoch needs a training set that can be indexed, not a stream: use every='step'.")
    return DataLoader(
        training.dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(args.seed + epoch),
        collate_fn=training.collate_fn,
    )


def _units_of(optimizer: Optimizer) -> list[Unit]:
    units: dict[str, Unit] = {}
    for group in optimizer.param_groups:
        unit = units.setdefault(group["unit"], Unit(group["unit"], group["block"], []))
        unit.parameters.extend(group["params"])
    return list(units.values())


def _checked_base_multipliers(policy: Policy, blocks: BlockMap) -> dict[str, float]:
    multipliers = policy.base_multipliers(blocks)
    for block, factor in multipliers.items():
        if not (math.isfinite(factor) and factor > 0):
            raise SurgicalError(
                f"{policy} gives block {block!r} the factor {factor}: it must be more than 0. To freeze a block, leave "
                "it out of `blocks`."
            )
    return multipliers
