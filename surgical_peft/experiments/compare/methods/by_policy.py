"""Learning rates by a policy: any policy by its name, and presets with titles of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import TrainingArguments

from .... import policies
from ....errors import SurgicalError
from ....policies.policy import Policy
from ....policies.stages import Stage, Stages, check_length, planned_length
from ....validation import call_with_options, check_count, resolve
from .method import Method, of_known_blocks, parsed
from .whole import tune_everything


def policy(name: str, options: Mapping[str, Any] | None = None, blocks: Any = None) -> Method:
    """Everything, or the blocks that you name, at the rates of a policy.

    Args:
        name: of the policy, from `policies`; your own as `package.module:name`.
        options: its arguments.
        blocks: to tune, as `BlockMap.parse` takes them; default: the whole model, without any wrapper.

    Costs: nothing to choose; in training what the policy does.

    Example:
        methods: [full, {policy: {name: lisa, options: {num_blocks: 1, every: 8}}}, {policy: {name: auto_snr}}]
    """
    if not isinstance(name, str) or not isinstance(options, Mapping | None):
        raise SurgicalError(
            f"policy: name={name!r}, options={options!r}: give the name of a policy and a mapping of its arguments, "
            "such as {name: lisa, options: {num_blocks: 1}}."
        )
    made = call_with_options("policy", name, resolve(name, policies), options or {}, gives=Policy)
    title = (
        f"{name.rpartition(':')[2]}({', '.join(f'{key}={value!r}' for key, value in sorted((options or {}).items()))})"
    )
    if blocks is None:
        return Method(title, wrap=tune_everything, policy=partial(_fitting, made))
    shown = ", ".join(map(str, blocks)) if isinstance(blocks, list) else str(blocks)
    return replace(of_known_blocks(f"{title}, blocks {shown}", parsed(blocks)), policy=partial(_fitting, made))


def _fitting(made: Policy, args: TrainingArguments) -> Policy:
    check_length(made, *planned_length(args))
    return made


def layer_decay(decay: float = 0.75) -> Method:
    """Full fine-tuning with rates that shrink by `decay` from each block to the one below it.

    Costs: nothing to choose.

    Example:
        methods: [full, {layer_decay: {decay: 0.65}}]
    """
    return replace(policy("layer_decay", {"decay": decay}), title=f"layer decay {decay:g}")


def lp_ft(epochs: int | None = None) -> Method:
    """The head alone for `epochs` epochs, then everything, at the same rate; default is half of the training.

    Costs: nothing to choose.

    Example:
        methods: [full, {lp_ft: {epochs: 2}}]
    """
    if epochs is not None:
        check_count("lp_ft", "epochs", epochs, "for the head alone")
    title = "LP-FT" if epochs is None else f"LP-FT, {epochs} + rest"
    return Method(title, wrap=tune_everything, policy=partial(_lp_ft, epochs))


def _lp_ft(epochs: int | None, args: TrainingArguments) -> Policy:
    if args.max_steps > 0:
        if epochs is not None or args.max_steps < 2:
            raise SurgicalError(
                f"lp_ft: epochs={epochs} does not fit max_steps={args.max_steps}: leave epochs out, for half of 2 "
                "steps or more, or give num_train_epochs instead of max_steps."
            )
        halves = (Stage("head", steps=args.max_steps // 2), Stage())
        return Stages(stages=halves, hard=True, state_policy="reset")
    if args.num_train_epochs < 2 and epochs is None:
        raise SurgicalError(
            f"lp_ft trains the head for half of all epochs, and there are {args.num_train_epochs:g}: raise "
            "num_train_epochs to 2 or more, or leave lp_ft out."
        )
    return _fitting(policies.lp_ft(epochs or int(args.num_train_epochs) // 2), args)


def auto_rgn() -> Method:
    """Every block at the rate that its relative gradient norm suggests, at every step; `policies.auto_rgn()`.

    Costs: nothing to choose; it reads the gradients at hand.

    Example:
        methods: [full, auto_rgn]
    """
    return replace(policy("auto_rgn"), title="Auto-RGN")


def auto_rgn_paper() -> Method:
    """Auto-RGN as the paper's code has it: by tensor, scored every epoch; `policies.auto_rgn_paper()`.

    Costs: 5 batches, forward and backward, every epoch.

    Example:
        methods: [full, auto_rgn_paper]
    """
    return replace(policy("auto_rgn_paper"), title="Auto-RGN (paper)")


def bvg_ls(momentum: str = "accumulate") -> Method:
    """BVG-LS as its code trains: SGD, Nesterov momentum 0.9, weight decay 5e-4, constant rate; `policies.bvg_ls`.

    Its rate in the released code is 1e-2; here it has a grid around that.

    Costs: nothing to choose; two numbers for every parameter are kept, and all gradients are needed.

    Example:
        methods: [full, bvg_ls]
    """
    sgd = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "weight_decay": 5e-4}
    return replace(
        policy("bvg_ls", {"momentum": momentum}),
        title="BVG-LS" if momentum == "accumulate" else f"BVG-LS, {momentum}",
        training={**sgd, "lr_scheduler_type": "constant", "warmup_steps": 0},
        rates=(3e-3, 1e-2, 3e-2),
    )
