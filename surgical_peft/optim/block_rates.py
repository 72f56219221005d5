"""Applies a policy's factors and masks around each step of one optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..masks import Masks
from ..policies.policy import Policy, StepLoss, TrainingState, Unit, warn_if_idle
from ..scoring.distributed import under_deepspeed
from ..validation import check_number, is_number
from .epochs import Epochs
from .origin import check_loaded, text_of
from .weak_hook import WeakHook

_living: weakref.WeakSet[BlockRates] = weakref.WeakSet()


class BlockRates:
    """A policy at work on one optimizer.

    What must outlive the process is in the parameter groups, which every optimizer saves and loads as they are: each
    group's constant factor (`base_multiplier`), its changing one (`lr_multiplier`), and in the first group under
    `surgical` the steps done, the epoch, the last probe, its scores and the policy's own state. `optimizer.state`
    would not do: AdamW takes it for its own, and torch casts what is in there to the weights' precision.

    A group's `lr` is the rate without factors, whoever sets it; both are applied while the optimizer steps. Where the
    group does not say `base_multiplier_at_step`, as under DeepSpeed and in older checkpoints, the constant factor is
    part of `lr`.

    Masks are lifted by `release`, and when the optimizer is no more. Of several optimizers on the same parameters only
    the one that began last masks them.

    Example:
        >>> optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=0.1, policy=policies.lisa(every=50))
        >>> optimizer.block_rates.release()  # after training: all that was frozen by turns may be trained again
    """

    def __init__(
        self, optimizer: Optimizer, policy: Policy, units: Sequence[Unit], blocks: BlockMap, model: nn.Module
    ) -> None:
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
        self.active = False  # whether it masks and has a say in the loss
        self.used: dict[str, float] = {}  # the factors of the last step, by unit
        self._units = list(units)
        self.blocks = blocks
        self._model = weakref.ref(model)
        self._masks = Masks(policy.state_policy)
        self._watch: Any = None  # on the model's forward pass
        self._step_loss: StepLoss | None = None
        self._epochs = Epochs(resumed=False)
        self._scaled: list[tuple[dict[str, Any], Any, Any]] = []  # each group while it steps: its own rate, the scaled
        for group in optimizer.param_groups:
            group["base_multiplier_at_step"] = not is_deepspeed
            if is_deepspeed:  # it steps with groups of its own, and takes over the rates as they are now
                group["lr"] = group["lr"] * group["base_multiplier"]
                self.used[group["unit"]] = group["base_multiplier"]
        if not is_deepspeed:
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        # For groups that are added later; what a policy plans does not reach them
        optimizer.defaults |= dict.fromkeys(("unit", "block"), "added") | {"policy": text_of(policy)}
        optimizer.defaults |= dict.fromkeys(("base_multiplier", "lr_multiplier"), 1.0)
        if policy != Policy():
            optimizer.__getstate__ = self._refuse_copy  # type: ignore[method-assign]
        optimizer.block_rates = self  # type: ignore[attr-defined]
        optimizer.register_load_state_dict_pre_hook(check_loaded)
        optimizer.register_load_state_dict_post_hook(self.resume)
        weakref.finalize(optimizer, self.release).atexit = False  # nothing here may hold the optimizer
        _living.add(self)
        self.restart(optimizer)
        constant = [group["base_multiplier"] for group in optimizer.param_groups]
        warn_if_idle(policy, self.training_state(optimizer), constant)

    def training_state(self, optimizer: Optimizer) -> TrainingState:
        """The training as the policy sees it."""
        record = optimizer.param_groups[0]["surgical"]
        for key in ("scores", "state"):
            record.setdefault(key, {})  # torch's distributed checkpoints leave empty dictionaries out
        return TrainingState(
            self._units, self.blocks, record["step"], record["epoch"], record["state"], record["scores"]
        )

    def set_multipliers(self, optimizer: Optimizer, multipliers: Mapping[str, float]) -> None:
        """Use these factors, by unit, from now on; units left out keep theirs.

        Raises:
            SurgicalError: a factor that is no number from 0 upwards, a unit that is not trained, or nothing left to
                train; the rates stay as they were.
        """
        current = {group["unit"]: group["lr_multiplier"] for group in optimizer.param_groups}
        for unit, factor in multipliers.items():
            if unit not in current:
                raise SurgicalError(
                    f"{self.policy} gives {unit!r} a factor, which is no {self.policy.granularity} that is trained. "
                    f"There are: {', '.join(sorted(current))}."
                )
            if not (is_number(factor) and factor >= 0):  # asked at every step: texts are made for an error alone
                check_number(str(self.policy), f"the factor of {unit!r}", factor, at_least=0)
        updated = {**current, **multipliers}
        if updated == current:
            return
        if not any(updated.values()):
            raise SurgicalError(
                f"{self.policy} gives everything the factor 0, so that nothing is trained. Trained before: "
                f"{', '.join(unit for unit, factor in current.items() if factor)}."
            )
        for group in optimizer.param_groups:
            group["lr_multiplier"] = updated[group["unit"]]
        self._mask(optimizer)

    def begin_epoch(self, optimizer: Optimizer, step: int, length: int | None = None) -> None:
        """Tell the policy that the loop begins a pass over the data; `SurgicalCallback` does.

        Args:
            optimizer: the one that these rates belong to.
            step: optimizer steps done, as the loop counts them.
            length: steps of an epoch; None if the loop does not know, as for a stream.
        """
        self._epochs.begin(optimizer.param_groups[0]["surgical"], step, length)
        self._plan(optimizer)

    def begin_step(self, optimizer: Optimizer, step: int) -> None:
        """Tell the policy of epochs that have ended where no pass begins; `SurgicalCallback` does."""
        if self._epochs.catch_up(optimizer.param_groups[0]["surgical"], step):
            self._plan(optimizer)

    def restart(self, optimizer: Optimizer) -> None:
        """Begin the schedule anew, as at the first step; the optimizer's moments stay."""
        record: dict[str, Any] = {"step": 0, "epoch": None, "epoch_steps": None, "probed": None}
        optimizer.param_groups[0]["surgical"] = {**record, "scores": {}, "state": {}}
        for group in optimizer.param_groups:
            group["lr_multiplier"] = 1.0
        self._begin(resumed=False)
        self._plan(optimizer)
        self._enforce(optimizer)

    def resume(self, optimizer: Optimizer) -> None:
        """Put the masks and the loss of the policy in force, as after loading."""
        for group in optimizer.param_groups:
            group["policy"] = text_of(self.policy)  # a state of an earlier version brought its own
        self._begin(resumed=True)
        self._step_loss = self.policy.loss(self.training_state(optimizer))
        self._enforce(optimizer)

    def release(self) -> None:
        """Lift all masks and take the stages' loss away, for the end of training; later, 0 is only a rate."""
        self.active = self.has_callback = False
        self._put_back()
        self._masks.lift(parameter for unit in self._units for parameter in unit.parameters)
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def by_block(self, values: Mapping[str, float]) -> dict[str, float]:
        """Values of units as one for each block, first block first: the mean over its entries."""
        sums: dict[str, tuple[float, int]] = {}
        for unit in self._units:
            if unit.name in values:
                total, count = sums.get(unit.block, (0.0, 0))
                sums[unit.block] = (total + unit.size * values[unit.name], count + unit.size)
        return {block: total / count for block, (total, count) in sums.items()}

    def _refuse_copy(self) -> NoReturn:
        raise SurgicalError(
            f"{self.policy} would not be in force in a copy of its optimizer, since torch leaves hooks out of copies: "
            "make another one with create_surgical_optimizer, on a copy of the model, and give it this one's state by "
            "load_state_dict(optimizer.state_dict())."
        )

    def _begin(self, resumed: bool) -> None:
        release_others({id(parameter) for unit in self._units for parameter in unit.parameters}, self)
        self.active, self._epochs = True, Epochs(resumed)

    def _enforce(self, optimizer: Optimizer) -> None:
        model = self._model()
        if self._watch is None and model is not None and (self.policy.own_loss or self.policy.hard):
            self._watch = model.register_forward_hook(WeakHook(self._check_outputs), with_kwargs=True)
        self._mask(optimizer)

    def _check_outputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
        """In training, put the policy's loss in place of the model's own, and see that it reaches what is trained."""
        if not module.training or module is not self._model():
            return
        if self.policy.own_loss:
            labels = kwargs.get("labels")
            if labels is None:
                raise SurgicalError(
                    f"the loss of {self.policy} needs the labels, and the model was called without any: give them as "
                    "`labels=`; with Trainer, leave out compute_loss_func and label_smoothing_factor, which take them."
                )
            if not isinstance(outputs, MutableMapping):
                raise SurgicalError(
                    f"the loss of {self.policy} takes the place of the model's own, and {self.blocks.model_name} "
                    f"returned a {type(outputs).__name__}: it must return a dict, as with return_dict=True."
                )
            if self._step_loss is not None:
                outputs["loss"] = self._step_loss(outputs, labels, num_items_in_batch=kwargs.get("num_items_in_batch"))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if self.policy.hard and torch.is_grad_enabled() and isinstance(loss, Tensor) and not loss.requires_grad:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                return  # the adapter is disabled, as for DPO's reference
            trained = {unit.block for unit in self._units for p in unit.parameters if p.requires_grad}
            raise SurgicalError(
                f"the loss of {self.blocks.model_name} does not depend on what {self.policy} trains now: "
                f"{', '.join(sorted(trained))}. Train a block with it that the loss reaches, or leave these out of "
                "`blocks`."
            )

    def _plan(self, optimizer: Optimizer) -> None:
        training = self.training_state(optimizer)
        if (multipliers := self.policy.plan(training)) is not None:
            self.set_multipliers(optimizer, multipliers)
        self._step_loss = self.policy.loss(training)

    def _mask(self, optimizer: Optimizer) -> None:
        if not self.policy.hard:
            return
        for group in optimizer.param_groups:
            trained = group["lr_multiplier"] > 0 or not self.active
            for parameter in group["params"]:
                self._masks.set(optimizer, parameter, trained)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()  # a step that raised got no post hook
        policy = self.policy
        if policy.probe_batches and not self.has_callback:
            raise SurgicalError(
                f"{policy} scores on training batches and needs data for it: add SurgicalCallback() to the Trainer's "
                "callbacks, or use a policy without a probe, such as auto_rgn(every='step')."
            )
        if policy.by_epoch and not (self.has_callback and self.training_state(optimizer).epoch is not None):
            raise SurgicalError(
                f"{policy} counts epochs, and nobody tells it: add SurgicalCallback() to the Trainer's callbacks, or "
                "measure in steps."
            )
        if (multipliers := policy.step_multipliers(self.training_state(optimizer))) is not None:
            self.set_multipliers(optimizer, multipliers)
        self._mask(optimizer)  # what was thawed by hand meanwhile
        self.used = {}
        for group in optimizer.param_groups:
            rate, factor = group["lr"], group["lr_multiplier"]
            self.used[group["unit"]] = factor * group["base_multiplier"]
            group["lr"] = rate * (self.used[group["unit"]] if group.get("base_multiplier_at_step") else factor)
            self._scaled.append((group, rate, group["lr"]))
            if policy.skip_idle and factor == 0:
                for parameter in group["params"]:
                    parameter.grad = None

    def _put_back(self) -> None:
        for group, rate, scaled in self._scaled:
            if group["lr"] is scaled:
                group["lr"] = rate  # the very object, not a quotient: nothing drifts
        self._scaled.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back()
        optimizer.param_groups[0]["surgical"]["step"] += 1
        self._plan(optimizer)


def release_others(parameters: Iterable[int], exempt: BlockRates | None = None) -> None:
    """Lift what other optimizers mask that train one of these parameters, by `id`; they mask no more."""
    parameters = set(parameters)
    for rates in list(_living):
        if rates is not exempt and any(id(p) in parameters for unit in rates._units for p in unit.parameters):
            rates.release()


def find_rates(optimizer: Any) -> tuple[Any, BlockRates | None]:
    """The optimizer within those of accelerate and DeepSpeed that has rates by block, and these."""
    while not hasattr(optimizer, "block_rates") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer, getattr(optimizer, "block_rates", None)
