"""The whole model: untouched, tuned at one rate, and tuned at rates that differ by block or in time."""

from __future__ import annotations

from functools import partial

from torch import nn
from transformers import TrainingArguments

from .... import policies
from ....errors import SurgicalError
from ....policies.policy import Policy
from ....policies.stages import Stage, Stages, check_length, planned_length
from ....scoring.selection import Selection
from ....validation import check_count
from ...recipe.recipe import Recipe
from .method import Method


def _tune_all(model: nn.Module, selection: Selection, recipe: Recipe) -> nn.Module:
    return model.requires_grad_(True)


def _tune_nothing(model: nn.Module, selection: Selection, recipe: Recipe) -> nn.Module:
    return model.requires_grad_(False)


def nothing() -> Method:
    """The source model as it is.

    Costs: nothing.

    Example:
        methods: [nothing, full]
    """
    return Method("no adaptation", wrap=_tune_nothing, rates=(), is_trained=False)


def full() -> Method:
    """Full fine-tuning, without any wrapper: what all others are compared with.

    Costs: nothing to choose.

    Example:
        methods: [full, head]
    """
    return Method("full fine-tuning", wrap=_tune_all)


def layer_decay(decay: float = 0.75) -> Method:
    """Full fine-tuning with rates that shrink by `decay` from each block to the one below it.

    Costs: nothing to choose.

    Example:
        methods: [full, {layer_decay: {decay: 0.65}}]
    """
    policy = policies.layer_decay(decay)
    return Method(f"layer decay {decay:g}", wrap=_tune_all, policy=lambda args: policy)


def lp_ft(epochs: int | None = None) -> Method:
    """The head alone for `epochs` epochs, then everything, at the same rate; default is half of the training.

    Costs: nothing to choose.

    Example:
        methods: [full, {lp_ft: {epochs: 2}}]
    """
    if epochs is not None:
        check_count("lp_ft", "epochs", epochs, "for the head alone")
    title = "LP-FT" if epochs is None else f"LP-FT, {epochs} + rest"
    return Method(title, wrap=_tune_all, policy=partial(_lp_ft, epochs))


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
    policy = policies.lp_ft(epochs or int(args.num_train_epochs) // 2)
    check_length(policy, *planned_length(args))
    return policy


def auto_rgn() -> Method:
    """Every block at the rate that its relative gradient norm suggests, at every step; `policies.auto_rgn()`.

    Costs: nothing to choose; it reads the gradients at hand.

    Example:
        methods: [full, auto_rgn]
    """
    return Method("Auto-RGN", wrap=_tune_all, policy=lambda args: policies.auto_rgn())


def auto_rgn_paper() -> Method:
    """Auto-RGN as the paper's code has it: by tensor, scored every epoch; `policies.auto_rgn_paper()`.

    Costs: 5 batches, forward and backward, every epoch.

    Example:
        methods: [full, auto_rgn_paper]
    """
    return Method("Auto-RGN (paper)", wrap=_tune_all, policy=lambda args: policies.auto_rgn_paper())


def bvg_ls(momentum: str = "accumulate") -> Method:
    """BVG-LS with its own recipe: SGD, Nesterov momentum 0.9, weight decay 5e-4, constant rate; `policies.bvg_ls`.

    Its rate in the released code is 1e-2; here it has a grid around that.

    Costs: nothing to choose; two numbers for every parameter are kept, and all gradients are needed.

    Example:
        methods: [full, bvg_ls]
    """
    policy = policies.bvg_ls(momentum=momentum)
    own = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "weight_decay": 5e-4}
    return Method(
        "BVG-LS" if momentum == "accumulate" else f"BVG-LS, {momentum}",
        wrap=_tune_all,
        policy=lambda args: policy,
        training={**own, "lr_scheduler_type": "constant", "warmup_steps": 0},
        rates=(3e-3, 1e-2, 3e-2),
    )
