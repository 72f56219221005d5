"""Runs one real training step, watches it, and puts everything back."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..optim.block_rates import find_rates
from ..precision.master_weights import KEY
from ..scoring.leftovers import Leftovers

_GRADIENT = vars(torch._C.TensorBase)["grad"].__get__  # `weight.grad` is no use of the weight


@dataclass(frozen=True)
class Step:
    """What was seen in a step; tensors by `id`.

    Attributes:
        loss: its value.
        used: parameters that the forward pass used.
        gradients: of each parameter `"none"`, `"zero"`, `"finite"` or `"bad"`.
        moved: parameters and buffers that it changed, or the masters of which it did.
        masters: parameters that the optimizer keeps a float32 master of.
    """

    loss: float
    used: frozenset[int]
    gradients: dict[int, str]
    moved: frozenset[int]
    masters: frozenset[int]


Kept = list[tuple[Tensor, Tensor]]  # tensors that a step may change, each with a copy of what it was


def run_step(model: nn.Module, optimizer: Optimizer, loss_of: Callable[[], Tensor], kept: Kept) -> Step:
    """One step in train mode: forward, backward, `optimizer.step()`; inside `put_back`, which says what is `kept`.

    A rate that a warmup holds at zero is its full one here. A policy sits the step out: what it lets rest stays.
    """
    model.train()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = None
    with _Uses(parameters) as uses, torch.enable_grad():
        loss = loss_of()
    if loss.requires_grad:
        loss.backward()
    gradients = {id(parameter): _kind(parameter.grad) for parameter in parameters}
    old_masters = {id(weight): master.clone() for weight, master in _masters(optimizer)}
    with _without_policy(optimizer), _full_rates(optimizer):
        optimizer.step()
    moved = {id(tensor) for tensor, before in kept if not _equal(tensor, before)}
    masters = {id(weight): master for weight, master in _masters(optimizer)}
    # Of a weight with a master a small step shows in the master only.
    befores = {id(tensor): before for tensor, before in kept} | old_masters
    moved |= {at for at, master in masters.items() if not _equal(master, befores[at].to(master.dtype))}
    reached = {at for at, kind in gradients.items() if kind != "none"}
    return Step(float(loss.detach()), frozenset(uses.seen | reached), gradients, frozenset(moved), frozenset(masters))


@contextmanager
def put_back(model: nn.Module, optimizer: Optimizer) -> Iterator[Kept]:
    """Gives the tensors that a step may change, and restores all that it does, also after an error.

    That is weights, buffers, gradients, modes, caches, the optimizer and all random states.

    Memory: a copy of the weights that are trained, and of the optimizer's state.
    """
    caches = Leftovers(model)
    kept = [(tensor, tensor.detach().clone()) for tensor in _may_move(model, optimizer)]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    restore = _snapshot(optimizer)
    devices = sorted({p.device.index for p, _, _ in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            yield kept
        finally:
            restore()
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            with torch.no_grad():
                for tensor, value in kept:
                    if not _equal(tensor, value):
                        tensor.copy_(value)
            caches.clear()
            for module, training in modes:
                module.training = training
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def members(optimizer: Optimizer) -> list[tuple[Any, dict[str, Any]]]:
    """The parameters of an optimizer, each with its group."""
    return [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]


class _Uses(TorchFunctionMode):
    """Notes which parameters are given to functions that make tensors of them."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._known = {id(parameter) for parameter in parameters}
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func != _GRADIENT and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.seen |= self._known.intersection(map(id, tree_leaves((args, kwargs))))
        return result


def _may_move(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = [parameter for parameter, _ in members(optimizer)]
    return list({id(tensor): tensor for tensor in (*trained, *held, *model.buffers())}.values())


def _masters(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    return [(weight, state[KEY]) for weight, state in optimizer.state.items() if KEY in state]


def _kind(gradient: Tensor | None) -> str:
    if gradient is None:
        return "none"
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    if not bool(values.isfinite().all()):
        return "bad"
    return "finite" if bool(values.any()) else "zero"


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.is_meta:
        return one.is_meta
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextmanager
def _without_policy(optimizer: Optimizer) -> Iterator[None]:
    """Inside, steps do not call the hooks of a policy, which would go on with its schedule."""
    _, rates = find_rates(optimizer)
    registries: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    kept = [dict(hooks) for hooks in registries]
    for hooks in registries:
        for key in [key for key, hook in hooks.items() if rates and getattr(hook, "__self__", None) is rates]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, before in zip(registries, kept, strict=True):
            hooks.clear()
            hooks.update(before)


@contextmanager
def _full_rates(optimizer: Optimizer) -> Iterator[None]:
    """Inside, a rate of zero that a scheduler begins with is the one that it warms up to."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if float(group["lr"]) == 0:
            group["lr"] = group.get("initial_lr", group["lr"])
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """A function that makes the optimizer what it is now: state, groups and attributes, the very same objects."""
    own = {"state", "param_groups"}
    attributes = {name: value for name, value in vars(optimizer).items() if name not in own}
    groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    states = [
        (weight, state, dict(state), {key: _copied(value) for key, value in state.items()})
        for weight, state in optimizer.state.items()
    ]

    @torch.no_grad()
    def restore() -> None:
        for name in vars(optimizer).keys() - attributes.keys() - own:
            delattr(optimizer, name)
        vars(optimizer).update(attributes)
        for group, values, params in groups:
            group.clear()
            group.update(values)
            group["params"][:] = params
        optimizer.state.clear()
        for weight, state, values, copies in states:
            for key, value in values.items():
                if isinstance(value, Tensor):
                    value.copy_(copies[key])
            state.clear()
            state.update({key: v if isinstance(v, Tensor) else copies[key] for key, v in values.items()})
            optimizer.state[weight] = state

    return restore


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
