"""Buffers that training changes, such as BatchNorm statistics: those an adapter holds, and those that have moved."""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from ..blocks.module_lists import join
from ..blocks.unwrap import named_bare_modules
from ..errors import first_of
from .config import SurgicalConfig
from .eval_mode import reads_training
from .layer import base_tensors
from .loading.fingerprint import differ_in_dtype, fingerprint
from .quantization import is_packed
from .tensors.tuned_tensors import TensorMap


def moving_buffers(model: nn.Module, chosen: Collection[str]) -> dict[str, set[str]]:
    """Modules outside the tuned ones whose saved buffers move where frozen blocks are in train mode.

    That is every module that behaves otherwise in training and has such buffers: batch and instance normalization,
    spectral normalization, a moving average of the user's. Packed layers, whose weights are buffers, are none.
    """
    tensors = TensorMap.find(model)
    return {
        path: set()
        for path, module in named_bare_modules(model)
        if (names := _own_buffers(tensors, path, module))
        and not names <= set(chosen)
        and reads_training(module)
        and not any(
            is_packed(tensors.places[name][0].tensor) and tensors.places[name][0].tensor.dim() for name in names
        )
    }


def _own_buffers(tensors: TensorMap, path: str, module: nn.Module) -> set[str]:
    return {tensors.first[name] for buffer in module._buffers if (name := join(path, buffer)) in tensors.first}


def note_buffers(model: nn.Module, config: SurgicalConfig, chosen: Collection[str]) -> None:
    """Store in `config`, unsaved, digests of the buffers that are not the adapter's."""
    config.buffers = {name: digest for name, digest in _digests(model).items() if name not in chosen}


def warn_of_moved_buffers(model: nn.Module, config: SurgicalConfig) -> None:
    """Warn of moved buffers when the adapter of `config` is saved.

    Warns:
        UserWarning: buffers of the base have moved since it was wrapped, as its own do not hold.
    """
    now = _digests(model) if config.buffers else {}
    before = {name: config.buffers[name] for name in now if name in config.buffers}
    moved = [name for name in before if now[name] != before[name] and not differ_in_dtype(now[name], before[name])]
    if moved:
        warnings.warn(
            f"{first_of(moved)}: changed since the model was "
            "wrapped, and not saved with the adapter, so that it answers otherwise where it is loaded again. What "
            "training moves in frozen blocks is saved with frozen_eval=False; what moves in any mode, with its block "
            "in blocks. Else keep the frozen blocks in eval mode, as train() of the wrapped model itself does.",
            stacklevel=2,
        )


def _digests(model: nn.Module) -> dict[str, str]:
    places = TensorMap.find(model).places
    buffers = {
        name: tensor
        for name, tensor in base_tensors(model).items()
        if not places[name][0].is_parameter and tensor.is_floating_point()
    }
    return {name: digest for name, tensor in buffers.items() if (digest := fingerprint([tensor])) is not None}
