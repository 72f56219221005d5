"""One forward pass, watched: when modules are called, when they return, and what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.unwrap import PARKED, named_bare_modules
from ..errors import SurgicalError
from ..tuner.eval_mode import reads_training
from ..tuner.loading.fingerprint import fingerprint
from .outputs import is_plain, map_tensors


class Trace:
    """What one forward pass of a model calls.

    Attributes:
        called, returned: when each module was first called, and when the watched ones returned, on one count.
        outputs: what the watched modules returned, those that are called once and return plain outputs.
        unfit: for each other watched module why its output cannot be kept.
    """

    def __init__(self, model: nn.Module, watched: Mapping[str, nn.Module]) -> None:
        self.model, self.watched = model, watched
        self.called: dict[nn.Module, int] = {}
        self.returned: dict[str, int] = {}
        self.outputs: dict[str, Any] = {}
        self.unfit: dict[str, str] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The forward pass is inside."""
        hooks = [module.register_forward_pre_hook(self._call) for module in self.model.modules()]
        hooks += [module.register_forward_hook(partial(self._return, name)) for name, module in self.watched.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _now(self) -> int:
        return len(self.called) + len(self.returned)

    def _call(self, module: nn.Module, args: Any) -> None:
        self.called.setdefault(module, self._now())

    def _return(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name in self.returned:
            self.unfit[name] = "is called more than once"
        elif not is_plain(output):
            self.unfit[name] = f"returns a {type(output).__name__}"
        else:
            self.outputs[name] = map_tensors(_copy, output)
        self.returned.setdefault(name, self._now())

    def first_tuned(self) -> int:
        """When the first module that holds something tuned was called."""
        names = dict(named_bare_modules(self.model))
        times = []
        for name, module in names.items():
            if PARKED in module._modules or any(p.requires_grad for p in _direct(module)):
                while name and names[name] not in self.called:  # its weights are read by the module around it
                    name = name.rpartition(".")[0]
                times.append(self.called.get(names[name], 0))
        return min(times, default=self._now())

    def tensors_before(self, time: int) -> list[Tensor]:
        """All weights and buffers of modules that had been called by then: what was computed by then is of these."""
        modules = [module for module, called in self.called.items() if called < time]
        return list({id(tensor): tensor for module in modules for tensor in _direct(module)}.values())

    def space_of(self, name: str) -> str:
        """A digest of what a watched module's output depends on besides the inputs.

        Raises:
            SurgicalError: some of the weights are not in this process.
        """
        weights = fingerprint(self.tensors_before(self.returned[name]))
        if weights is None:
            raise SurgicalError(f"not all weights up to {name} are in this process (sharded, offloaded or empty).")
        config: Any = getattr(self.model, "config", None)
        device = next(self.model.parameters()).device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        settings = config.to_json_string() if hasattr(config, "to_json_string") else str(config)
        attention = getattr(config, "_attn_implementation", None)
        versions = [version("torch"), version("transformers")]
        known = (type(self.model).__qualname__, name, weights, settings, attention, precision, *versions)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:32]


def _direct(module: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def random_modules(module: nn.Module) -> list[str]:
    """The modules in it that draw or count in their present mode: dropout that is on, batch statistics."""
    found = []
    for name, inner in module.named_modules():
        if not inner.training or not reads_training(inner):
            continue
        drops = [value for key, value in vars(inner).items() if "drop" in key and isinstance(value, int | float)]
        drops += [child.p for child in (inner, *inner.children()) if isinstance(child, nn.modules.dropout._DropoutNd)]
        if any(drops) or (not drops and not list(inner.children())):
            found.append(name)
    return found


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()  # some models go on in place with what they are given
