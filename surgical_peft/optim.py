"""Learning rates by block: one optimizer factory for `Trainer` and any other loop.

Every (unit, weight decay or not) is a parameter group. Constant factors go into the group's base rate. Changing ones
are applied by a hook just before `optimizer.step` and taken back just after it, so schedulers, clipping and logging
see the rates that they would see without a policy, and nothing depends on `Trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import OptimizerNames

from .blocks import BlockMap
from .errors import SurgicalError
from .policies.policy import Policy, Unit
from .scoring import score_blocks
from .wrappers import clean_name


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
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # uses no self
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for block, named in blocks.named_parameters(model).items():
        for name, parameter in named.items():
            if parameter.requires_grad:
                unit = block if policy.granularity == "block" else clean_name(name)
                decays = name in decayed
                if (unit, decays) not in groups:
                    groups[unit, decays] = {
                        "params": [],
                        "lr": lr * base.get(block, 1.0),
                        "weight_decay": weight_decay if decays else 0.0,
                        "unit": unit,
                        "block": block,
                        "policy": str(policy),
                        "lr_multiplier": 1.0,
                        "probed_epoch": None,
                    }
                groups[unit, decays]["params"].append(parameter)
    if not groups:
        raise SurgicalError(
            "nothing to train: no parameter of the model has requires_grad. Wrap it with a SurgicalConfig first."
        )
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
                f"optim={OptimizerNames(args.optim).value!r} makes its own parameter groups and cannot have a rate "
                "for each block: use one that takes groups, such as 'adamw_torch' or 'sgd'."
            )
        settings = {**kwargs, "lr": args.learning_rate, "weight_decay": args.weight_decay}
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
    """Applies a policy's factors around each step of one optimizer.

    What must outlive the process (policy, factors, epoch of the last probe) is in the parameter groups, which every
    optimizer saves and loads.
    """

    def __init__(self, optimizer: Optimizer, policy: Policy) -> None:
        self.policy = policy
        self.has_callback = False
        self._rates: list[tuple[Any, Any]] = []  # of each group while it steps: its own rate, the scaled one
        optimizer.block_rates = self  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_load_state_dict_pre_hook(_check_loaded)

    def set_multipliers(self, optimizer: Optimizer, multipliers: dict[str, float]) -> None:
        """Use these factors, by unit, from the next step on; units left out keep theirs.

        Raises:
            SurgicalError: a factor that is negative or not finite, or a unit that is not trained; the rates stay as
                they were.
        """
        known = {group["unit"] for group in optimizer.param_groups}
        for unit, factor in multipliers.items():
            if unit not in known:
                raise SurgicalError(
                    f"{self.policy} gives {unit!r} a factor, which is no {self.policy.granularity} that is trained. "
                    f"There are: {', '.join(sorted(known))}."
                )
            if not (math.isfinite(factor) and factor >= 0):
                raise SurgicalError(
                    f"{self.policy} gives {unit!r} the factor {factor}: it must be a number from 0 upwards."
                )
        for group in optimizer.param_groups:
            group["lr_multiplier"] = multipliers.get(group["unit"], group["lr_multiplier"])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._after_step(optimizer, args, kwargs)  # a step that raised got no post hook
        if self.policy.probe_batches and not self.has_callback:
            raise SurgicalError(
                f"{self.policy} scores at the start of every epoch and needs data for it: add SurgicalCallback() to "
                "the Trainer's callbacks, or use every='step'."
            )
        if (multipliers := self.policy.step_multipliers(_units_of(optimizer))) is not None:
            self.set_multipliers(optimizer, multipliers)
        for group in optimizer.param_groups:
            rate = group["lr"]
            group["lr"] = rate * group["lr_multiplier"]
            self._rates.append((rate, group["lr"]))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, (rate, scaled) in zip(optimizer.param_groups, self._rates, strict=False):
            if group["lr"] is scaled:
                group["lr"] = rate  # the very object, not a quotient: nothing drifts
        self._rates.clear()


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
            raise SurgicalError(
                "SurgicalCallback found no surgical optimizer: give the Trainer "
                "optimizer_cls_and_kwargs=surgical_optimizer(args, policy) as well."
            )
        rates.has_callback = True
        policy = rates.policy
        epoch = int((state.epoch or 0.0) + 1e-6)
        if not policy.probe_batches or optimizer.param_groups[0]["probed_epoch"] == epoch:
            return
        training = kwargs["train_dataloader"]
        if isinstance(training.dataset, IterableDataset) or not hasattr(training.dataset, "__getitem__"):
            raise SurgicalError(
                f"{policy} scores every epoch and needs a training set that can be indexed, not a stream "
                f"({type(training.dataset).__name__}): use every='step'."
            )
        batches = _probe_batches(training, state.train_batch_size, args.seed + epoch)
        scores = score_blocks(kwargs["model"], batches, "rgn", policy.granularity, policy.probe_batches)
        rates.set_multipliers(optimizer, policy.multipliers_from(scores, _units_of(optimizer)))
        for group in optimizer.param_groups:
            group["probed_epoch"] = epoch


def _probe_batches(training: DataLoader, batch_size: int | None, seed: int) -> Iterator[Any]:
    """Batches of the training set by a loader of their own: half-read, the Trainer's would change what follows.

    The seed is for what the data set or its collator draws (augmentation, masking); `score_blocks`, which reads the
    batches, puts the random states back.
    """
    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    yield from DataLoader(
        training.dataset, batch_size, shuffle=True, generator=generator, collate_fn=training.collate_fn
    )


def _units_of(optimizer: Optimizer) -> list[Unit]:
    units: dict[str, Unit] = {}
    for group in optimizer.param_groups:
        unit = units.setdefault(group["unit"], Unit(group["unit"], group["block"], []))
        unit.parameters.extend(group["params"])
    return list(units.values())


def _check_loaded(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    saved, own = _origin(state_dict["param_groups"]), _origin(optimizer.param_groups)
    if saved != own:
        raise SurgicalError(
            f"this checkpoint was trained under {saved}, not under {own}: resume with what wrote it, or start anew."
        )


def _origin(groups: list[dict[str, Any]]) -> str:
    if "policy" not in groups[0]:
        return "another optimizer"
    blocks = dict.fromkeys(group["block"] for group in groups)
    return f"{groups[0]['policy']} on the blocks {', '.join(blocks)}"


def _checked_base_multipliers(policy: Policy, blocks: BlockMap) -> dict[str, float]:
    multipliers = policy.base_multipliers(blocks)
    for block, factor in multipliers.items():
        if block not in blocks.names:
            raise SurgicalError(
                f"{policy} gives {block!r} a factor, which is no block of {blocks.model_name}. There are: "
                f"{', '.join(blocks.names)}."
            )
        if not (math.isfinite(factor) and factor > 0):
            raise SurgicalError(
                f"{policy} gives block {block!r} the factor {factor}: it must be more than 0. To freeze a block, "
                "leave it out of `blocks`."
            )
    return multipliers
