"""One batch whose rows go through different modules: `model(..., adapter_names=["a", "b", "__base__"])`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import Cache, PreTrainedModel

from ..blocks.unwrap import named_bare_modules
from ..errors import SurgicalError
from .layer import SurgicalLayer
from .tensors.slots import BASE


def check_rows(model: nn.Module, adapters: Sequence[str], adapter_names: Sequence[str], inputs: Sequence[Any]) -> None:
    """Refuse names that do not fit the adapters or the inputs; the words are PEFT's, which others look for.

    Raises:
        SurgicalError: an unknown name, not one name for each row of the first tensor of `inputs`, or a model in train
            mode or with merged adapters.
    """
    if model.training:
        raise SurgicalError(
            "Cannot pass `adapter_names` when the model is in training mode: mixed batches are for inference, call "
            "model.eval() first."
        )
    if unknown := sorted(set(adapter_names) - {*adapters, "__base__"}):
        raise SurgicalError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {', '.join(adapters)}, "
            "and '__base__' for the model without one."
        )
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise SurgicalError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    rows = next((len(value) for value in inputs if isinstance(value, Tensor) and value.ndim), len(adapter_names))
    if rows != len(adapter_names):
        raise SurgicalError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {rows} respectively."
        )


@contextmanager
def rows_by_adapter(
    model: nn.Module, adapter_names: Sequence[str], num_beams: int, paths: Iterable[str] = ()
) -> Iterator[None]:
    """While it is open, each row of a batch goes through the adapter of its name; keys and values are not cached.

    With beams, each beam is a row, but an encoder sees every example once. `paths` are those of the tuned modules.
    """
    divided = divided_modules(model, list(paths))
    beams = [name for name in adapter_names for _ in range(num_beams)]
    encoder = model.get_encoder() if num_beams > 1 and isinstance(model, PreTrainedModel) else model
    inside = set() if encoder is model else set(encoder.modules())
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)
    }
    if isinstance(model, PreTrainedModel) and model.can_generate():
        configs[0] = model.generation_config
    cached = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", False)]

    def names_for(module: nn.Module) -> list[str]:
        return list(adapter_names) if module in inside else beams

    handles = [
        module.register_forward_pre_hook(partial(_hand_over, names=names_for(module)), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not isinstance(module, SurgicalLayer)
    ]
    replaced = [(module, module.__dict__.get("forward")) for module in divided]
    try:
        for module, layers in divided.items():
            module.forward = partial(_by_rows, module, module.forward, layers, names_for(module))
        for config, _ in cached:
            config.use_cache = False
        yield
    finally:
        for config, use_cache in cached:
            config.use_cache = use_cache
        for handle in handles:
            handle.remove()
        for module, forward in replaced:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def divided_modules(model: nn.Module, paths: Iterable[str]) -> dict[nn.Module, list[SurgicalLayer]]:
    """The modules that run once for each adapter of a batch, and the layers in them.

    Args:
        paths: those of the tuned modules of all adapters. The largest are taken, and besides them modules that hold a
            tensor tied to one of theirs.
    """
    largest = [path for path in paths if not any(path.startswith(other + ".") for other in paths)]
    modules = dict(named_bare_modules(model))
    divided: dict[nn.Module, list[SurgicalLayer]] = {modules[path]: [] for path in largest}
    home = {inner: module for module in divided for inner in module.modules()}
    for layer in [module for module in model.modules() if isinstance(module, SurgicalLayer)]:
        for owner in dict.fromkeys(module for slot in layer.slots.values() for module, _ in slot.places):
            divided.setdefault(home.get(owner, owner), []).append(layer)
    return {module: layers for module, layers in divided.items() if layers}


def _by_rows(
    module: nn.Module,
    forward: Callable[..., Any],
    layers: list[SurgicalLayer],
    names: list[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a module once for each adapter that `names` asks for in it, on its rows, with its tensors standing."""
    known = {name for layer in layers for name in layer.adapters}
    names = [name if name in known else BASE for name in names]
    if len(set(names)) > 1 and any(
        isinstance(part, nn.MultiheadAttention) and not part.batch_first for part in module.modules()
    ):
        raise SurgicalError(
            f"adapter_names: {type(module).__name__} holds a nn.MultiheadAttention whose rows are positions, not "
            "examples: build it with batch_first=True, or use one adapter at a time."
        )

    def run(name: str, *args: Any, **kwargs: Any) -> Any:
        for layer in layers:
            layer.stand([] if layer.disable_adapters else [name])  # disabled, names have no say
        return forward(*args, **kwargs)

    try:
        return run_by_rows(names, run, *args, **kwargs)
    finally:
        for layer in layers:
            layer.arrange()


def _hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": names}


def run_by_rows(names: Sequence[str], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a module once for each different name, on its rows of the batch, and join the outputs in the batch's order.

    Args:
        names: one for each example of the batch.
        run: `(name, *args, **kwargs) -> output` of the module for this name.
        *args, **kwargs: what the module takes. The first tensor tells the batch: `len(names)` rows, or a multiple of
            it where examples were cut into windows, those of one example together. Every tensor of two or more
            dimensions with as many rows is split; whatever else is there goes to all alike.

    Raises:
        SurgicalError: the rows do not fit the number of names, or the call carries a cache of keys and values.

    Example:
        >>> run_by_rows(["a", "b", "a"], run, hidden_states)  # rows 0 and 2 go through `a`
    """
    different = list(dict.fromkeys(names))
    if len(different) == 1:
        return run(names[0], *args, **kwargs)
    leaves, _ = tree_flatten((args, kwargs))
    lead = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if lead is None or lead.ndim == 0 or lead.shape[0] % len(names):
        given = "no tensor" if lead is None else f"{tuple(lead.shape)}"
        raise SurgicalError(
            f"adapter_names has {len(names)} names, but a tuned module is called with {given}, whose rows are not "
            "those of the batch: give one name per example, and choose whole blocks for adapters that share a batch "
            "(experts, for one, see tokens and not examples)."
        )
    if any(isinstance(leaf, Cache) for leaf in leaves):
        raise SurgicalError(
            "adapter_names cannot be used with a cache of keys and values, which the adapters of a batch would share: "
            "pass use_cache=False, or generate for one adapter at a time."
        )
    size, size_each = lead.shape[0], lead.shape[0] // len(names)
    rows = [
        torch.tensor(
            [
                index * size_each + row
                for index, other in enumerate(names)
                if other == name
                for row in range(size_each)
            ],
            device=lead.device,
        )
        for name in different
    ]
    outputs = []
    for name, indices in zip(different, rows, strict=True):
        own_args, own_kwargs = tree_map(lambda leaf, indices=indices: _pick(leaf, lead, indices), (args, kwargs))
        outputs.append(tree_flatten(run(name, *own_args, **own_kwargs)))
    parts = zip(*(leaves for leaves, _ in outputs), strict=True)
    return tree_unflatten([_join(part, rows, size) for part in parts], outputs[0][1])


def _pick(leaf: Any, lead: Tensor, rows: Tensor) -> Any:
    split = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == lead.shape[0]
    return leaf[rows.to(leaf.device)] if split and (leaf.ndim >= 2 or leaf is lead) else leaf


def _join(parts: Sequence[Any], rows: Sequence[Tensor], size: int) -> Any:
    """Rows back in their places; what was one row for all (T5's position bias) becomes one for each."""
    first = parts[0]
    if not isinstance(first, Tensor) or not first.ndim:
        return first
    if any(part.shape[0] not in (1, len(indices)) for part, indices in zip(parts, rows, strict=True)):
        return first
    joined = first.new_empty((size, *first.shape[1:]))
    for part, indices in zip(parts, rows, strict=True):
        joined[indices.to(part.device)] = part.expand(len(indices), *part.shape[1:])
    return joined
