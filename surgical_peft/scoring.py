"""`score_blocks`: which blocks the new data pull at hardest, without a second copy of the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import criteria
from .blocks import BlockMap
from .errors import SurgicalError
from .names import nearest, resolve
from .scores import BlockScores
from .wrappers import clean_name, idle_parameters

Criterion = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
LossFunction = Callable[[nn.Module, Any], Tensor]

GRANULARITIES = ("block", "module", "tensor")


def score_blocks(
    model: nn.Module,
    dataloader: Iterable[Any],
    criterion: str | Criterion = "rgn",
    granularity: str = "block",
    num_batches: int = 5,
    loss_fn: LossFunction | None = None,
) -> BlockScores:
    """Score every block of `model` on labelled data; the model comes back as it was.

    Gradients are read as the backward pass delivers them, reduced to one number a unit and freed at once: memory is
    weights + activations + one unit's gradients. The model runs in eval mode, as in the paper's code.

    Args:
        model: bare or wrapped; all its floating-point parameters in use are scored, frozen ones too.
        dataloader: batches as the model takes them, `{"pixel_values": ..., "labels": ...}`.
        criterion: a name from `criteria` or a function `(weights, grads) -> float`.
        granularity: what is scored: `"block"`, `"module"` (each module that holds weights itself) or `"tensor"`.
        num_batches: how many batches to average over; fewer if the loader ends. The paper uses 5.
        loss_fn: `(model, batch) -> scalar loss`; default `model(**batch).loss`.

    Returns:
        The scores, larger = tune it. Units whose weights are all zero are left out (`scores.unscored`).

    Raises:
        SurgicalError: empty loader, a batch without labels, a NaN or infinite gradient (names the unit and batch).

    Example:
        >>> scores = score_blocks(model, DataLoader(dataset, batch_size=32), num_batches=5)
        >>> print(scores)
    """
    if granularity not in GRANULARITIES:
        raise SurgicalError(
            f"granularity={granularity!r} is unknown: {nearest(granularity, GRANULARITIES)}"
            f"There are: {', '.join(GRANULARITIES)}."
        )
    if num_batches < 1:
        raise SurgicalError(f"num_batches={num_batches} is out of range: score on at least 1 batch.")
    score = resolve(criterion, criteria) if isinstance(criterion, str) else criterion
    blocks = BlockMap.find(model)
    loss_of = loss_fn or _model_loss
    with _as_it_was(model):
        units = _units(model, blocks, granularity)
        zero = [name for name, unit in units.items() if not any(bool(weight.any()) for weight in unit)]
        for weight in (weight for name in zero for weight in units[name]):
            weight.requires_grad_(False)  # nobody reads its gradient
        scored = {name: unit for name, unit in units.items() if name not in zero}
        reader = _GradientReader(scored, score)
        batches = 0
        for batch in islice(dataloader, num_batches):
            loss = loss_of(model, _to_device(batch, model))
            reader.read(loss, batches)
            batches += 1
    if not batches:
        raise SurgicalError("the data loader is empty: scoring needs at least one batch of labelled examples.")
    return BlockScores(
        values={name: float(np.mean(values)) for name, values in reader.values.items()},
        sizes={name: sum(weight.numel() for weight in unit) for name, unit in scored.items()},
        blocks={name: name if granularity == "block" else blocks.block_of(name) for name in scored},
        unscored=tuple(zero),
        criterion=criterion if isinstance(criterion, str) else _name_of(criterion),
        granularity=granularity,
        num_batches=batches,
        model_name=blocks.model_name,
    )


class _GradientReader:
    """Waits during backward until all gradients of a unit are in, scores them and frees them at once."""

    def __init__(self, units: dict[str, list[nn.Parameter]], score: Criterion) -> None:
        self.units = units
        self.score = score
        self.values: dict[str, list[float]] = {name: [] for name in units}
        self.awaited: dict[str, set[int]] = {}
        self.batch = 0
        self._owner = {id(weight): name for name, unit in units.items() for weight in unit}

    def read(self, loss: Tensor, batch: int) -> None:
        self.batch = batch
        reached = _leaves(loss)
        for name, unit in self.units.items():
            ids = {id(weight) for weight in unit}
            self.awaited[name] = ids & reached or ids
        hooks = [w.register_post_accumulate_grad_hook(self._take) for unit in self.units.values() for w in unit]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        for name in list(self.awaited):  # units that take no part in this batch
            self._finish(name)

    def _take(self, weight: Tensor) -> None:
        name = self._owner[id(weight)]
        if name not in self.awaited:
            raise SurgicalError(
                f"{name!r} got a gradient that the graph did not announce, so its score would be wrong: with gradient "
                "checkpointing, use use_reentrant=False."
            )
        self.awaited[name].discard(id(weight))
        if not self.awaited[name]:
            self._finish(name)

    def _finish(self, name: str) -> None:
        del self.awaited[name]
        weights = self.units[name]
        grads = [w.new_zeros(()).expand_as(w) if w.grad is None else w.grad for w in weights]
        with torch.no_grad():
            value = float(self.score([w.detach() for w in weights], grads))
        for weight in weights:
            weight.grad = None
        if not np.isfinite(value):
            raise SurgicalError(
                f"the gradient of {name!r} in batch {self.batch} gives the score {value}: it is NaN or infinite. Look "
                "at that batch for bad inputs or labels, or score in float32 or bfloat16 instead of float16."
            )
        self.values[name].append(value)


def _leaves(loss: Tensor) -> set[int]:
    """`id`s of the parameters that the backward pass will reach: an expert without a token in the batch is not one."""
    leaves: set[int] = set()
    seen, ahead = {loss.grad_fn}, [loss.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        ahead += new
    return leaves


def _name_of(criterion: Criterion) -> str:
    """`package.module:name` of a function, or of the class of a callable object."""
    function: Any = criterion if hasattr(criterion, "__qualname__") else type(criterion)
    return f"{function.__module__}:{function.__qualname__}"


def _units(model: nn.Module, blocks: BlockMap, granularity: str) -> dict[str, list[nn.Parameter]]:
    """The parameters of `model` in use by unit; module and tensor units go by their cleaned names."""
    units: dict[str, list[nn.Parameter]] = {}
    idle = idle_parameters(model)
    for block, named in blocks.named_parameters(model).items():
        for name, parameter in named.items():
            if not parameter.requires_grad or id(parameter) in idle:
                continue
            path = clean_name(name)
            unit = {"block": block, "module": path.rpartition(".")[0], "tensor": path}[granularity]
            units.setdefault(unit, []).append(parameter)
    return units


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise SurgicalError(
            f"a batch is a {type(batch).__name__}, not a mapping of the model's arguments: give a collate_fn that "
            "returns a dict, or loss_fn=(model, batch) -> loss."
        )
    unlabelled = (
        f"the model returned no loss for a batch with the keys {', '.join(batch)}: add 'labels' to the batch, or "
        "give loss_fn=(model, batch) -> loss."
    )
    try:
        loss = getattr(model(**batch), "loss", None)
    except ValueError as error:  # a sequence-to-sequence model cannot even run without labels
        if "labels" in batch:
            raise
        raise SurgicalError(unlabelled) from error
    if loss is None:
        raise SurgicalError(unlabelled)
    return loss


def _to_device(batch: Any, model: nn.Module) -> Any:
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return batch


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Eval mode and all gradients on; then `requires_grad`, `.grad`, modes and random states back as they were."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p, _, _ in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            for parameter, _, _ in parameters:
                parameter.grad = None
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            model.eval()
            yield
        finally:
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for module, training in modes:
                module.training = training
            random.setstate(python_state)
            np.random.set_state(numpy_state)
