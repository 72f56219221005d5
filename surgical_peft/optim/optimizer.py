"""Learning rates by block: one optimizer factory for `Trainer` and any other loop.

Every unit (a block, or a tensor of one), its weights and what has no weight decay apart, is a parameter group.
Factors are applied by hooks just before and after `optimizer.step` (see `block_rates`), so they hold
whatever sets `lr`; schedulers, clipping and logging see the rates that they would see without a policy, and nothing
depends on `Trainer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import OptimizerNames

from ..blocks.block_map import BlockMap
from ..blocks.unwrap import bare_parameter_name
from ..errors import SurgicalError
from ..policies.policy import STATE_POLICIES, Policy, Unit
from ..precision.master_weights import MasterWeights, rounds_stochastically
from ..scoring.distributed import under_deepspeed
from ..validation import check_choice, check_number
from .block_rates import BlockRates, release_others
from .origin import text_of


def create_surgical_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    weight_decay: float = 0.0,
    policy: Policy | None = None,
    master_weights: bool = True,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over the trainable parameters of `model`, a group for each block; for any training loop.

    Args:
        model: bare or wrapped; what has `requires_grad` is trained. A policy that freezes changes this as it goes,
            from here on until training ends or the optimizer is gone: build the optimizer last, after everything that
            reads `requires_grad`. What an earlier optimizer of this model has frozen so is trained again, and so is a
            weight that you freeze while the policy rests it, unless the whole model is frozen: call
            `optimizer.block_rates.release()` first.
        optimizer_cls: any optimizer that takes parameter groups.
        lr: learning rate, more than 0; policies multiply it.
        weight_decay: for weights; biases and norms have none, by `Trainer`'s own rule.
        policy: from `policies`; None = the same rate everywhere.
        master_weights: keep a float32 master of each 16-bit weight that is trained, in the optimizer's state, and step
            on that; False = steps vanish in rounding where they are small. Not needed, and not done, where the
            optimizer rounds stochastically or DeepSpeed keeps masters of its own. Change such weights between steps
            in place or by loading, not entry by entry through `weight.data`, which torch does not tell of.
        **kwargs: for `optimizer_cls`.

    Weights that `optimizer.add_param_group` adds later are trained at the rate of their group, with masters, and no
    policy reaches them. A copy or a pickled one keeps its masters; under a policy, which copies would lose, it is
    refused.

    Raises:
        SurgicalError: nothing to train, a rate or a factor of the policy that is not a finite number above 0, weights
            on the meta device, an optimizer that does not take what is trained, a policy that does not fit the model,
            or one that freezes under several processes.

    Example:
        >>> optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-3, policy=policies.auto_rgn())
    """
    _check_policy(policy)
    policy = policy or Policy()
    check_choice(str(policy), "state_policy", policy.state_policy, STATE_POLICIES)
    check_number("the optimizer", "lr", _plain(lr), above=0)
    check_number("the optimizer", "weight_decay", _plain(weight_decay), at_least=0)
    release_others(map(id, model.parameters()))
    blocks = BlockMap.find(model)
    base = _checked_base_multipliers(policy, blocks)
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # uses no self
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    units: dict[str, Unit] = {}
    for block, named in blocks.named_parameters(model).items():
        for name, parameter in named.items():
            if parameter.requires_grad:
                unit = block if policy.granularity == "block" else bare_parameter_name(name)
                decays = weight_decay > 0 and name in decayed
                if (unit, decays) not in groups:
                    groups[unit, decays] = {
                        "params": [],
                        "lr": lr,
                        "weight_decay": weight_decay if decays else 0.0,
                        "unit": unit,
                        "block": block,
                        "policy": text_of(policy),
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
    _check_in_memory(groups)
    try:
        optimizer = optimizer_cls(ordered, lr=lr, **kwargs)  # type: ignore[call-arg]
    except ValueError as error:  # Muon takes matrices, LBFGS one group
        shapes = sorted({weight.ndim for group in ordered for weight in group["params"]})
        raise SurgicalError(
            f"{optimizer_cls.__name__} does not take what is trained, weights of {' and '.join(map(str, shapes))} "
            f"dimensions in {len(ordered)} groups: {error} Take an optimizer that does, such as torch.optim.AdamW, or "
            "tune what it takes: SurgicalConfig(target_modules=...)."
        ) from error
    has_masters = master_weights and not rounds_stochastically(optimizer) and not under_deepspeed()
    masters = MasterWeights(optimizer) if has_masters else None  # float32 weights may become 16-bit ones yet
    if masters:  # its hooks around a step are the inner ones: the policy's see the model's own weights
        optimizer.register_step_post_hook(masters.give_back)
    BlockRates(optimizer, policy, list(units.values()), blocks, model)
    if masters:
        optimizer.register_step_pre_hook(masters.lend)
    return optimizer


class SurgicalOptimizerFactory:
    """Builds the optimizer inside `Trainer`, which calls `SurgicalOptimizerFactory()(model, **kwargs)`.

    `args` is read when called, so `Trainer.hyperparameter_search` over `learning_rate` or `weight_decay` works. Every
    `args.optim` that takes parameter groups does; GaLore, APOLLO and LOMO, which bring their own, are refused.
    """

    def __call__(
        self, model: nn.Module, *, args: TrainingArguments, policy: Policy | None = None, master_weights: bool = True
    ) -> Optimizer:
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]
        if is_optimizer_factory(optimizer_cls) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            raise SurgicalError(
                f"optim={OptimizerNames(args.optim).value!r} makes its own parameter groups and cannot have a rate "
                "for each block: use one that takes groups, such as 'adamw_torch' or 'sgd'."
            )
        settings = {**kwargs, "lr": args.learning_rate, "weight_decay": args.weight_decay}
        return create_surgical_optimizer(
            model, optimizer_cls, policy=policy, master_weights=master_weights, **settings
        )


def surgical_optimizer(
    args: TrainingArguments, policy: Policy | None = None, master_weights: bool = True
) -> tuple[type[SurgicalOptimizerFactory], dict[str, Any]]:
    """The value of `Trainer(optimizer_cls_and_kwargs=...)` for learning rates by block.

    Args:
        args: the Trainer's; read when it makes its optimizer.
        policy: as in [`create_surgical_optimizer`][surgical_peft.create_surgical_optimizer].
        master_weights: as there.

    Raises:
        SurgicalError: something else than a policy; all else is said when the Trainer makes its optimizer.

    Example:
        >>> Trainer(model=model, args=args, optimizer_cls_and_kwargs=surgical_optimizer(args, policies.auto_rgn()))
    """
    _check_policy(policy)
    return SurgicalOptimizerFactory, {"args": args, "policy": policy, "master_weights": master_weights}


def _check_policy(policy: Any) -> None:
    if policy is not None and not isinstance(policy, Policy):
        raise SurgicalError(
            f"policy={policy!r} is not a policy: give one with its brackets, such as policies.auto_rgn(); names are "
            "for recipes."
        )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _check_in_memory(groups: Mapping[tuple[str, bool], dict[str, Any]]) -> None:
    """Refuse weights that a step would leave as they are; where processes share them out, some have them later."""
    lost = sorted({group["block"] for group in groups.values() if any(w.is_meta for w in group["params"])})
    if lost and not (dist.is_initialized() and dist.get_world_size() > 1):
        raise SurgicalError(
            f"the weights of {', '.join(lost)} are on the meta device, so that no step would change them: load the "
            "model's weights first, and without offloading (device_map) what is trained."
        )


def _checked_base_multipliers(policy: Policy, blocks: BlockMap) -> dict[str, float]:
    multipliers = policy.base_multipliers(blocks)
    for block, factor in multipliers.items():
        if block not in blocks.names:
            raise SurgicalError(
                f"{policy} gives {block!r} a factor, which is no block of {blocks.model_name}. There are: "
                f"{', '.join(blocks.names)}."
            )
        rule = "to freeze a block, leave it out of `blocks`; else a finite number"
        check_number(str(policy), f"the factor of {block!r}", factor, rule, above=0)
    return multipliers
