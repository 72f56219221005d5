"""Gradient norms of many units at once, relative to their weights or not, from the gradients before a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.distributed.tensor import DTensor

from ..criteria.criterion import whole
from ..criteria.rgn import foreach_norm, piece_norms, pieces
from .policy import Unit

_PIECE = 2**16  # entries: four times as many as the criterion takes, and twice as fast


def gradient_ratios(units: Sequence[Unit]) -> list[float]:
    """`||g|| / ||theta||` of each unit from `parameter.grad`; one transfer to the host however many tensors there are.

    A parameter without a gradient counts as a zero one. A unit whose weights are all zero gives NaN, a gradient that
    is not finite `inf`.
    """
    norms_of = _norms_on_cpu if all(unit.parameters[0].is_cpu for unit in units) else _norms_in_one_call
    with torch.set_grad_enabled(False):  # which the optimizer's step uses anyway; to call `no_grad` too takes longer
        norms = norms_of(units)
    return [_ratio(pull, size) for size, pull in zip(norms[::2], norms[1::2], strict=True)]


def gradient_norms(units: Iterable[Unit]) -> dict[str, float]:
    """`||g||` of each unit from `parameter.grad`; units without a gradient, or with one that is not finite, have none.

    One transfer to the host however many tensors there are; of what FSDP2 has sharded, all processes must ask.
    """
    grads = {
        unit.name: tensors if isinstance(tensors[0], DTensor) else pieces(tensors, _PIECE)
        for unit in units
        if (tensors := _grads(unit.parameters))
    }
    norms = [whole(norm) for tensors in grads.values() for norm in foreach_norm(tensors)]
    numbers = iter(torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else ())
    values = {name: math.hypot(*islice(numbers, len(tensors))) for name, tensors in grads.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _norms_on_cpu(units: Sequence[Unit]) -> list[float]:
    """For each unit the norm of its weights, then that of its gradients.

    After a backward pass no cache holds this code or its data, and fetching them takes longer than running it. So the
    usual way through is short: a run is copied into one, since a call for each tensor would take longer.
    """
    norms: list[Tensor] = []
    parts: list[int] = []
    alone = torch.get_num_threads() == 1  # then it copies larger runs as fast, and fewer calls are better
    for unit in units:
        weights = [unit.parameters] if alone and unit.size <= _PIECE else unit.runs
        for runs in (weights, [_grads(run) for run in weights]):
            count = 0
            for run in runs:
                if not run:
                    continue
                if run[0].numel() > _PIECE:
                    norms.append(piece_norms(run, _PIECE))
                else:
                    flat = _flatten_dense_tensors(run)
                    dtype = torch.promote_types(flat.dtype, torch.float32)
                    norms.append(torch.linalg.vector_norm(flat, dtype=dtype).view(1))
                count += len(norms[-1])
            parts.append(count)
    numbers = iter(torch.cat(norms).tolist())
    return [math.hypot(*islice(numbers, count)) for count in parts]


def _grads(run: Sequence[Tensor]) -> list[Tensor]:
    return [grad for parameter in run if (grad := parameter.grad) is not None]


def _norms_in_one_call(units: Sequence[Unit]) -> list[float]:
    """The same where each call has to be sent to a device."""
    lists = [pieces(tensors, _PIECE) for unit in units for tensors in (unit.parameters, _grads(unit.parameters))]
    norms = foreach_norm([tensor for tensors in lists for tensor in tensors])
    device = norms[0].device
    numbers = iter(torch.stack([norm if norm.device == device else norm.to(device) for norm in norms]).tolist())
    return [math.hypot(*islice(numbers, len(tensors))) for tensors in lists]


def _ratio(pull: float, size: float) -> float:
    if size == 0:
        return math.nan
    return pull / size if math.isfinite(pull) else math.inf
