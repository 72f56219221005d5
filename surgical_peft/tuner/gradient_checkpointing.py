"""Gradient checkpointing from the first tuned block on, however it is switched on.

transformers checkpoints every layer, and to make that work with a frozen start it lets the embeddings' output require
a gradient: the backward pass then goes through the whole frozen prefix, and recomputes it first. A hook on the base
model puts this right at each training step, and only while checkpointing is on, so nothing needs to be switched.
In eval mode, where nothing is checkpointed, the tuner takes the hook away: it costs 5 microseconds at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

# What `enable_input_require_grads` of transformers and PEFT's own version for other models hang on the embeddings.
_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
_IN_EVAL = "_surgical_checkpoint_in_eval"  # on a layer: checkpoint it although it is in eval mode
_ROUSED = "_surgical_roused"  # on the base model, during its forward: the layers marked so


def skip_frozen_prefix(model: nn.Module) -> None:
    """Let gradient checkpointing, whenever it is on, spare what lies before the first tuned block of `model`.

    Layers that no gradient passes through run plainly: neither recomputed nor differentiated. All others are
    checkpointed, also frozen ones in eval mode, which run in eval mode again when they are recomputed. Calling it
    twice changes nothing. The hook travels with `copy.deepcopy` and pickle.

    Args:
        model: the base model, tuned blocks in place. Other than transformers models are left as they are.

    Example:
        >>> skip_frozen_prefix(model)
        >>> model.gradient_checkpointing_enable()
    """
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward)


def pause_prefix_skipping(model: nn.Module) -> None:
    """Take the hooks of `skip_frozen_prefix` off the model until it is called again; for eval mode."""
    _after_forward(model)  # after an interrupted one
    _remove_hooks(model._forward_pre_hooks, lambda hook: hook is _before_forward)
    _remove_hooks(model._forward_hooks, lambda hook: hook is _after_forward, model._forward_hooks_always_called)


def restore_checkpointing(model: nn.Module) -> None:
    """Take back `skip_frozen_prefix`: checkpointing is transformers' own again."""
    pause_prefix_skipping(model)
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, CheckpointWhereNeeded):
            module.__dict__["_gradient_checkpointing_func"] = function.original


@dataclass(frozen=True)
class CheckpointWhereNeeded:
    """Stands in for a module's `_gradient_checkpointing_func`: checkpoints a layer only if a gradient needs it."""

    original: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function`, a layer's forward, on `args`; `kwargs` are the checkpoint function's own."""
        layer, bound = _layer_and_keywords(function)
        if layer is None:
            return self.original(function, *args, **kwargs)
        if layer.__dict__.get(_IN_EVAL):
            function = partial(_run_in_eval, layer, function)
        direct = _any_requires_grad(args)
        nested = _any_requires_grad(tree_leaves([bound, [arg for arg in args if not isinstance(arg, Tensor)]]))
        trained = _any_requires_grad(layer.parameters())
        # Layers within layers (Swin's stages): the inner ones decide, else a stage's frozen start would be recomputed.
        divided = any(_checkpoints(module) for module in layer.modules() if module is not layer)
        if divided or not (direct or nested or trained):
            return function(*args)
        if nested or not direct:  # the reentrant kind would lose gradients that do not come in as direct arguments
            kwargs["use_reentrant"] = False
        return self.original(function, *args, **kwargs)


def _before_forward(model: nn.Module, args: Any) -> None:
    _after_forward(model)  # after an interrupted one, which torch calls no hook for
    if not (model.training and torch.is_grad_enabled() and _any_is_on(model)):
        return
    modules = [module for module in model.modules() if _is_on(module)]
    # A model with another way of checkpointing, code from before transformers 4.35, is left alone.
    if any("_gradient_checkpointing_func" not in module.__dict__ for module in modules):
        return
    _let_inputs_be(model)
    roused: list[nn.Module] = []
    model.__dict__[_ROUSED] = roused
    if _after_forward not in model._forward_hooks.values():  # a hook costs time at every call: only where it is needed
        model.register_forward_hook(_after_forward, always_call=True)
    for module in modules:
        function = module.__dict__["_gradient_checkpointing_func"]
        if not isinstance(function, CheckpointWhereNeeded):
            module.__dict__["_gradient_checkpointing_func"] = CheckpointWhereNeeded(function)
        # transformers checkpoints in train mode only. All that the layer runs in eval mode still does.
        if _checkpoints(module) and not module.training:
            module.training = True
            module.__dict__[_IN_EVAL] = True
            roused.append(module)


def _after_forward(model: nn.Module, args: Any = None, output: Any = None) -> None:
    for layer in model.__dict__.pop(_ROUSED, ()):
        layer.training = False
        del layer.__dict__[_IN_EVAL]


def _let_inputs_be(model: nn.Module) -> None:
    """Undo `enable_input_require_grads`, also an earlier call whose hooks transformers has lost in a later one."""
    for module in model.modules():
        _remove_hooks(module._forward_hooks, lambda hook: getattr(hook, "__name__", None) in _INPUT_HOOKS)


def _remove_hooks(
    hooks: dict[int, Callable[..., Any]], unwanted: Callable[[Any], bool], *marks: dict[int, Any]
) -> None:
    for key in [key for key, hook in hooks.items() if unwanted(hook)]:
        for kept in (hooks, *marks):
            kept.pop(key, None)


def _run_in_eval(layer: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    training, layer.training = layer.training, False
    try:
        return function(*args)
    finally:
        layer.training = training


def _layer_and_keywords(function: Callable[..., Any]) -> tuple[nn.Module | None, dict[str, Any]]:
    """The layer whose forward `function` runs, and the keywords bound to it."""
    owner, keywords = None, {}
    if isinstance(function, partial):
        keywords = function.keywords
        owner = function.args[0] if function.args else None  # partial(forward, layer, **keywords)
        function = function.func
    owner = getattr(function, "__self__", owner)  # transformers 5.4, and encoders written for 4: layer.__call__
    return (owner if isinstance(owner, nn.Module) else None), keywords


def _is_on(module: nn.Module) -> bool:
    return bool(module.__dict__.get("gradient_checkpointing"))


def _checkpoints(module: nn.Module) -> bool:
    return isinstance(module, GradientCheckpointingLayer) and _is_on(module)  # T5's attention has the mere flag


def _any_is_on(model: nn.Module) -> bool:
    """Asked at each training step, so it does not look inside layers: `model.modules()` takes 50 times as long."""
    ahead = [model]
    for module in ahead:
        if module.__dict__.get("gradient_checkpointing"):
            return True
        if not isinstance(module, GradientCheckpointingLayer):
            ahead += [child for child in module._modules.values() if child is not None]
    return False


def _any_requires_grad(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)
