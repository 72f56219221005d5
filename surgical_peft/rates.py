"""Applies a policy's factors and masks around each step of one optimizer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from .blocks import BlockMap
from .errors import SurgicalError
from .policies.policy import Policy, Run, StepLoss, Unit


class BlockRates:
    """A policy at work on one optimizer.

    What must outlive the process is in the parameter groups, which every optimizer saves and loads as they are: each
    group's factor (`lr_multiplier`), and in the first group under `surgical` the steps done, the epoch, the last
    probe, its scores and the policy's own state. `optimizer.state` would not do: AdamW takes it for its own, and torch
    casts what is in there to the weights' precision.

    Example:
        >>> optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policies.lisa(every=50))
        >>> optimizer.block_rates.release()  # after training: all that was frozen by turns may be trained again
    """

    def __init__(self, optimizer: Optimizer, policy: Policy, units: Sequence[Unit], blocks: BlockMap) -> None:
        if policy.hard and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise SurgicalError(
                f"{policy} freezes and thaws blocks during training, which DistributedDataParallel does not notice: "
                f"it runs on 1 process, not on {dist.get_world_size()}. Give the policy hard=False (a rate of 0 "
                "instead), or choose the blocks once, by SurgicalConfig(blocks=...)."
            )
        is_deepspeed = under_deepspeed()
        if is_deepspeed and not policy.is_constant:
            raise SurgicalError(
                f"{policy} follows gradients or changes rates during training, and DeepSpeed, whose optimizer keeps "
                "both flattened and in pieces, shows it neither: use a policy of constant factors, such as "
                "layer_decay(), or train with DistributedDataParallel or FSDP."
            )
        self.policy = policy
        self.has_callback = False
        self.used: dict[str, float] = {}  # the factors of the last step, by unit
        self._units = list(units)
        self._blocks = blocks
        self._step_loss: StepLoss | None = None
        self._active = True
        self._rates: list[tuple[Any, Any]] = []  # of each group while it steps: its own rate, the scaled one
        first = optimizer.param_groups[0]
        first["surgical"] = {"step": 0, "epoch": None, "probed": None, "scores": {}, "state": {}}
        optimizer.block_rates = self  # type: ignore[attr-defined]
        if is_deepspeed:  # it steps with groups of its own; constant factors are part of the rates that it took over
            self.used = {group["unit"]: group["base_multiplier"] for group in optimizer.param_groups}
        else:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        optimizer.register_load_state_dict_pre_hook(_check_loaded)
        optimizer.register_load_state_dict_post_hook(self.resume)
        self._plan(optimizer)

    def run(self, optimizer: Optimizer) -> Run:
        """The training as the policy sees it."""
        record = optimizer.param_groups[0]["surgical"]
        for key in ("scores", "state"):
            record.setdefault(key, {})  # torch's distributed checkpoints leave empty dictionaries out
        return Run(self._units, self._blocks, record["step"], record["epoch"], record["state"], record["scores"])

    def set_multipliers(self, optimizer: Optimizer, multipliers: Mapping[str, float]) -> None:
        """Use these factors, by unit, from now on; units left out keep theirs.

        Raises:
            SurgicalError: a factor that is negative or not finite, a unit that is not trained, or nothing left to
                train; the rates stay as they were.
        """
        now = {group["unit"]: group["lr_multiplier"] for group in optimizer.param_groups}
        for unit, factor in multipliers.items():
            if unit not in now:
                raise SurgicalError(
                    f"{self.policy} gives {unit!r} a factor, which is no {self.policy.granularity} that is trained. "
                    f"There are: {', '.join(sorted(now))}."
                )
            if not (math.isfinite(factor) and factor >= 0):
                raise SurgicalError(
                    f"{self.policy} gives {unit!r} the factor {factor}: it must be a number from 0 upwards."
                )
        new = {**now, **multipliers}
        if new == now:
            return
        if not any(new.values()):
            raise SurgicalError(
                f"{self.policy} gives everything the factor 0, so that nothing is trained. Trained before: "
                f"{', '.join(unit for unit, factor in now.items() if factor)}."
            )
        for group in optimizer.param_groups:
            group["lr_multiplier"] = new[group["unit"]]
        if self.policy.hard:
            self._mask(optimizer)

    def begin_epoch(self, optimizer: Optimizer, epoch: int) -> None:
        """Tell the policy that this epoch begins, counted from 0; `SurgicalCallback` does."""
        optimizer.param_groups[0]["surgical"]["epoch"] = epoch
        self._plan(optimizer)

    def resume(self, optimizer: Optimizer) -> None:
        """Put the masks and the loss of the policy in force, as after loading."""
        self._active = True
        self._step_loss = self.policy.loss(self.run(optimizer))
        if self.policy.hard:
            self._mask(optimizer)

    def release(self) -> None:
        """Lift all masks and take the stages' loss away; for the end of training."""
        self._active = False
        if self.policy.hard:
            for parameter in (parameter for unit in self._units for parameter in unit.parameters):
                parameter.requires_grad_(True)

    def by_block(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values of units as one for each block, first block first: the mean over its entries."""
        sums: dict[str, tuple[float, int]] = {}
        for unit in self._units:
            if unit.name in values:
                total, count = sums.get(unit.block, (0.0, 0))
                sums[unit.block] = (total + unit.size * values[unit.name], count + unit.size)
        return {block: total / count for block, (total, count) in sums.items()}

    def watch_loss(self, model: nn.Module) -> None:
        """Compute the loss of the policy on what `model` returns, in place of the model's own, while it trains."""
        me = weakref.ref(self)  # the model must not keep an optimizer alive

        def replace(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
            rates = me()
            if rates is None or not rates._active or rates._step_loss is None or not module.training:
                return outputs
            labels = kwargs.get("labels")
            if labels is None:
                raise SurgicalError(
                    f"the loss of {rates.policy} needs the labels, and the model was called without any: give them as "
                    "`labels=`; with Trainer, leave out compute_loss_func and label_smoothing_factor, which take them."
                )
            outputs["loss"] = rates._step_loss(outputs, labels, num_items_in_batch=kwargs.get("num_items_in_batch"))
            return outputs

        model.register_forward_hook(replace, with_kwargs=True)

    def _plan(self, optimizer: Optimizer) -> None:
        run = self.run(optimizer)
        if (multipliers := self.policy.plan(run)) is not None:
            self.set_multipliers(optimizer, multipliers)
        self._step_loss = self.policy.loss(run)

    def _mask(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                trained = group["lr_multiplier"] > 0
                parameter.requires_grad_(trained)
                if not trained:
                    parameter.grad = None
                    if self.policy.state_policy == "reset":
                        optimizer.state.pop(parameter, None)
                if self.policy.state_policy == "offload" and parameter in optimizer.state:
                    _move(optimizer.state[parameter], parameter.device if trained else "cpu")

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back(optimizer)  # a step that raised got no post hook
        policy = self.policy
        if policy.probe_batches and not self.has_callback:
            raise SurgicalError(
                f"{policy} scores on training batches and needs data for it: add SurgicalCallback() to the Trainer's "
                "callbacks, or use a policy without a probe, such as auto_rgn(every='step')."
            )
        if policy.by_epoch and not self.has_callback:
            raise SurgicalError(
                f"{policy} counts epochs, and nobody tells it: add SurgicalCallback() to the Trainer's callbacks, or "
                "measure in steps."
            )
        if (multipliers := policy.step_multipliers(self.run(optimizer))) is not None:
            self.set_multipliers(optimizer, multipliers)
        if policy.hard and self._active:  # PEFT lifts masks where it switches adapters, as for DPO's reference
            self._mask(optimizer)
        self.used = {}
        for group in optimizer.param_groups:
            rate, factor = group["lr"], group["lr_multiplier"]
            self.used[group["unit"]] = factor * group["base_multiplier"]
            group["lr"] = rate * factor
            self._rates.append((rate, group["lr"]))
            if policy.skip_idle and factor == 0:
                for parameter in group["params"]:
                    parameter.grad = None

    def _put_back(self, optimizer: Optimizer) -> None:
        for group, (rate, scaled) in zip(optimizer.param_groups, self._rates, strict=False):
            if group["lr"] is scaled:
                group["lr"] = rate  # the very object, not a quotient: nothing drifts
        self._rates.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back(optimizer)
        optimizer.param_groups[0]["surgical"]["step"] += 1
        self._plan(optimizer)


def under_deepspeed() -> bool:
    """Whether DeepSpeed will step, with groups and weights of its own."""
    return is_initialized() and AcceleratorState().distributed_type is DistributedType.DEEPSPEED


def _move(state: dict[str, Any], device: Any) -> None:
    """Moments to a device; single numbers, such as Adam's count of steps, stay where the optimizer wants them."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            state[key] = value.to(device)


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
