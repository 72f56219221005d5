"""Learning rates by block: one optimizer factory for `Trainer` and any other loop.

Every unit (a block, or a tensor of one), its weights and what has no weight decay apart, is a parameter group.
Factors are applied by a hook just before `optimizer.step` and taken back just after it (see `rates`), so they hold
whatever sets `lr`; schedulers, clipping and logging see the rates that they would see without a policy, and nothing
depends on `Trainer`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import OptimizerNames

from .blocks import BlockMap
from .errors import SurgicalError
from .policies.policy import STATE_POLICIES, Policy, Unit, check_word, is_number
from .rates import BlockRates, release_others
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
        model: bare or wrapped; what has `requires_grad` is trained. A policy that freezes changes this as it goes,
            from here on until training ends or the optimizer is gone: build the optimizer last, after everything that
            reads `requires_grad`. What an earlier optimizer of this model has frozen so is trained again.
        optimizer_cls: any optimizer that takes parameter groups.
        lr: learning rate; policies multiply it.
        weight_decay: for weights; biases and norms have none, by `Trainer`'s own rule.
        policy: from `policies`; None = the same rate everywhere.
        **kwargs: for `optimizer_cls`.

    Raises:
        SurgicalError: nothing to train, a factor of the policy that is not a finite number above 0, a policy that does
            not fit the model, or one that freezes under several processes.

    Example:
        >>> optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policies.auto_rgn())
    """
    if policy is not None and not isinstance(policy, Policy):
        raise SurgicalError(f"policy={policy!r} is not a policy: call it first, as in policies.auto_rgn().")
    policy = policy or Policy()
    check_word(str(policy), "state_policy", policy.state_policy, STATE_POLICIES)
    release_others(map(id, model.parameters()))
    blocks = BlockMap.find(model)
    base = _checked_base_multipliers(policy, blocks)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # uses no self
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    units: dict[str, Unit] = {}
    for block, named in blocks.named_parameters(model).items():
        for name, parameter in named.items():
            if parameter.requires_grad:
                unit = block if policy.granularity == "block" else clean_name(name)
                decays = weight_decay > 0 and name in decayed
                if (unit, decays) not in groups:
                    groups[unit, decays] = {
                        "params": [],
                        "lr": lr,
                        "weight_decay": weight_decay if decays else 0.0,
                        "unit": unit,
                        "block": block,
                        "policy": str(policy),
                        "base_multiplier": base.get(block, 1.0),
                        "lr_multiplier": 1.0,
                    }
                groups[unit, decays]["params"].append(parameter)
                units.setdefault(unit, Unit(unit, block, [])).parameters.append(parameter)
    if not groups:
        raise SurgicalError(
            "nothing to train: no parameter of the model has requires_grad. Wrap it with a SurgicalConfig first."
        )
    # The highest rate first, as in older checkpoints; under DeepSpeed Trainer logs the rate of the first group.
    ordered = sorted(groups.values(), key=lambda group: -group["base_multiplier"])
    optimizer = optimizer_cls(ordered, lr=lr, **kwargs)  # type: ignore[call-arg]
    BlockRates(optimizer, policy, list(units.values()), blocks, model)
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


def _checked_base_multipliers(policy: Policy, blocks: BlockMap) -> dict[str, float]:
    multipliers = policy.base_multipliers(blocks)
    for block, factor in multipliers.items():
        if block not in blocks.names:
            raise SurgicalError(
                f"{policy} gives {block!r} a factor, which is no block of {blocks.model_name}. There are: "
                f"{', '.join(blocks.names)}."
            )
        if not (is_number(factor) and factor > 0):
            raise SurgicalError(
                f"{policy} gives block {block!r} the factor {factor!r}: it must be more than 0. To freeze a block, "
                "leave it out of `blocks`."
            )
    return multipliers
