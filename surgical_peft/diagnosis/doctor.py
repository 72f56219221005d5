"""`doctor`: one real step of a training, and what is wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from ..blocks.block_map import BlockMap
from ..blocks.unwrap import PARKED
from ..errors import SurgicalError
from ..optim.block_rates import find_rates
from ..optim.of_trainer import compute_loss_of
from ..precision.master_weights import is_16_bit, rounds_stochastically
from ..scoring.batches import LossFunction, model_loss, to_device
from ..scoring.distributed import under_deepspeed
from .diagnosis import Diagnosis, TensorReport
from .names import engine_names, other_names, parameters_in_use, untied_names
from .one_step import Step, members, put_back, run_step


def doctor(
    training: Trainer | tuple[nn.Module, Optimizer], batch: Any = None, loss_fn: LossFunction | None = None
) -> Diagnosis:
    """Run one real training step, say of every tensor how it fares, and put everything back.

    Weights, buffers, gradients, modes, the optimizer's state and all random states are as before. It takes room for a
    copy of the weights that are trained and of the optimizer's state. Gradient checkpointing is as the model has it:
    Trainer turns it on only when it trains. Under `torch.compile` it is not seen which frozen weights are used.

    Args:
        training: a Trainer, whose optimizer is made if there is none yet; or the model and its optimizer.
        batch: what the step is made on; default is the first batch of the Trainer's own.
        loss_fn: `(model, batch)` -> loss, where it is not the model's own; a Trainer brings its own.

    Returns:
        a row for each tensor, and the faults: trainable without a gradient, not in the optimizer, frozen in it, weight
        decay on norms and biases, 16-bit without a float32 master, not moved by the step, a broken tie, a name that no
        inference engine knows, and others; `FAULTS` in `diagnosis.diagnosis` has them all.

    Raises:
        SurgicalError: no batch, something else than a Trainer or a pair, several processes, or a batch without a loss.

    Example:
        >>> diagnosis = doctor((model, optimizer), batch)
        >>> assert diagnosis.is_healthy, diagnosis
    """
    if under_deepspeed() or (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        raise SurgicalError("doctor looks at whole tensors: run it in one process, without DeepSpeed or FSDP.")
    if isinstance(training, Trainer):
        with _optimizer_of(training) as optimizer:
            model: Any = training.model
            return _examine(model, optimizer, lambda: _loss_of_trainer(training, batch))
    if not (isinstance(training, tuple) and len(training) == 2 and isinstance(training[0], nn.Module)):
        raise SurgicalError(f"doctor takes a Trainer or (model, optimizer), not a {type(training).__name__}.")
    model, optimizer = training[0], _inner(training[1])
    if batch is None:
        raise SurgicalError("doctor needs a batch for its step: doctor((model, optimizer), batch).")
    loss = loss_fn or model_loss
    return _examine(model, optimizer, lambda: loss(model, to_device(batch, model)))


def _inner(optimizer: Any) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise SurgicalError(f"a {type(optimizer).__name__} is no optimizer of torch: give (model, optimizer).")
    return optimizer


@contextmanager
def _optimizer_of(trainer: Trainer) -> Iterator[Optimizer]:
    """The Trainer's optimizer, or one made for the time being; the Trainer counts no step of it."""
    model: Any = trainer.model
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = dict(vars(trainer))
    metrics = copy.deepcopy(attributes.get("_metrics"))  # those of TRL, averaged for the next log
    try:
        yield _inner(trainer.optimizer or trainer.create_optimizer())
    finally:
        _, rates = find_rates(trainer.optimizer)
        if rates is not None and attributes["optimizer"] is None:
            rates.release()
        vars(trainer).clear()
        vars(trainer).update(attributes)
        if metrics is not None:
            vars(trainer)["_metrics"] = metrics
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def _loss_of_trainer(trainer: Trainer, batch: Any) -> Tensor:
    if batch is None:
        if trainer.train_dataset is None:
            raise SurgicalError("the Trainer has no train_dataset: give doctor a batch.")
        batch = next(iter(trainer.get_train_dataloader()))
    model: Any = trainer.model
    with trainer.accelerator.autocast():
        return compute_loss_of(trainer)(model, trainer._prepare_inputs(batch))


def _examine(model: nn.Module, optimizer: Optimizer, loss_of: Callable[[], Tensor]) -> Diagnosis:
    if lost := [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.is_meta]:
        raise SurgicalError(f"{lost[0]} is on the meta device, where no step changes it: load the weights first.")
    with put_back(model, optimizer) as kept:
        step = run_step(model, optimizer, loss_of, kept)
    return Diagnosis(tuple(_reports(model, optimizer, step)), step.loss, type(optimizer).__name__)


def _reports(model: nn.Module, optimizer: Optimizer, step: Step) -> Iterator[TensorReport]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for parameter, group in members(optimizer):
        groups.setdefault(id(parameter), []).append(group)
    in_use = parameters_in_use(model)
    block_of, names, engine = _blocks(model), other_names(model), engine_names(model)
    undecayed = set(in_use) - set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    untied = {*untied_names(model)}
    rounds = rounds_stochastically(optimizer)
    alive = {block_of(name) for name, (_, p) in in_use.items() if step.gradients.get(id(p)) in ("finite", "bad")}
    for name, (bare, parameter) in in_use.items():
        own = groups.pop(id(parameter), [])
        trainable = parameter.requires_grad
        gradient = step.gradients.get(id(parameter), "none")
        used, moved = id(parameter) in step.used, id(parameter) in step.moved
        master = id(parameter) in step.masters
        decay = max((float(group.get("weight_decay", 0)) for group in own), default=0.0)
        rests = any(group.get("lr_multiplier") == 0 for group in own)  # a policy's, for now
        tied = tuple(other for other in names[id(parameter)] if other != bare)
        found = {
            "unused": trainable and not used,
            "no_gradient": trainable and used and gradient == "none",
            "zero_gradient": trainable and gradient == "zero" and block_of(name) not in alive,
            "bad_gradient": gradient == "bad",
            "not_in_optimizer": trainable and not own,
            "frozen_in_optimizer": not trainable and bool(own) and not rests,
            "twice": len(own) > 1,
            "decayed": trainable and decay > 0 and name in undecayed,
            "no_master": trainable and bool(own) and is_16_bit(parameter) and not master and not rounds,
            "not_moved": trainable and bool(own) and gradient == "finite" and not moved,
            "moved_frozen": moved and not trainable,
            "untied": bool(untied.intersection((bare, *tied))),
            "unknown_name": trainable and engine[name] == "not",
        }
        yield TensorReport(
            name=bare,
            block=block_of(name),
            parameters=parameter.numel(),
            trainable=trainable,
            in_optimizer=bool(own),
            used=used,
            gradient=gradient,
            weight_decay=decay,
            dtype=_dtype(parameter),
            master=master,
            moved=moved,
            tied=tied,
            engine=engine[name],
            faults=tuple(fault for fault, is_there in found.items() if is_there),
        )
    yield from _moved_statistics(model, step, block_of)
    yield from _strangers(model, optimizer, groups)


def _moved_statistics(model: nn.Module, step: Step, block_of: Callable[[str], str]) -> Iterator[TensorReport]:
    """Statistics of batch normalizations that moved with nothing in their module being trained."""
    for path, module in model.named_modules():
        is_trained = PARKED in module._modules or any(p.requires_grad for p in module.parameters(recurse=False))
        if not isinstance(module, nn.modules.batchnorm._NormBase) or is_trained:
            continue
        for name, buffer in module.named_buffers(path, recurse=False):
            if id(buffer) in step.moved and buffer.is_floating_point():
                yield _alone(name, block_of(name), buffer, "moved_frozen", in_optimizer=False)


def _strangers(
    model: nn.Module, optimizer: Optimizer, groups: dict[int, list[dict[str, Any]]]
) -> Iterator[TensorReport]:
    """What the optimizer holds and the model does not have; parked sets are the model's."""
    known = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for at, parameter in enumerate(group["params"]):
            if id(parameter) in groups:
                fault = "frozen_in_optimizer" if id(parameter) in known else "not_of_model"
                yield _alone(f"group {number}, parameter {at}, {list(parameter.shape)}", "", parameter, fault)


def _alone(name: str, block: str, tensor: Tensor, fault: str, in_optimizer: bool = True) -> TensorReport:
    moved, trainable = fault == "moved_frozen", tensor.requires_grad
    seen = (trainable, in_optimizer, False, "none", 0.0, _dtype(tensor), False, moved, (), "not")
    return TensorReport(name, block, tensor.numel(), *seen, (fault,))


def _blocks(model: nn.Module) -> Callable[[str], str]:
    """The block of a name; empty where the model has no blocks, or the name is of none."""
    try:
        blocks = BlockMap.find(model)
    except SurgicalError:
        return lambda name: ""

    def block_of(name: str) -> str:
        try:
            return blocks.block_of(name)
        except SurgicalError:
            return ""

    return block_of


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
