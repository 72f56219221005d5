"""Scoring in several processes at once: who looks at which batches, and how their findings become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, send_to_device
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..criteria.criterion import Moments

Told = TypeVar("Told")


def several() -> bool:
    """True if other processes score too."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def under_deepspeed() -> bool:
    """True if DeepSpeed will step, with groups and weights of its own."""
    return is_initialized() and AcceleratorState().distributed_type is DistributedType.DEEPSPEED


def is_first() -> bool:
    """True in the process that prints for all."""
    return not several() or dist.get_rank() == 0


def without_ddp(model: nn.Module) -> nn.Module:
    """The model inside DDP, whose backward pass would average the gradients of different batches."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """True if FSDP2 has sharded the weights: then all processes run every batch together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def split_batches(batches: Sequence[Any], everywhere: bool) -> tuple[list[tuple[int, Any]], int]:
    """The batches that this process scores, each with its position in the union, and the size of the union.

    In the union the processes take turns: the first batches of all, then the second ones. With `everywhere`, every
    process scores all of it.
    """
    if not several():
        return list(enumerate(batches)), len(batches)
    counts: list[int] = _all(len(batches))
    rank = dist.get_rank()
    if not everywhere:
        return [(_position(counts, rank, turn), batch) for turn, batch in enumerate(batches)], sum(counts)
    everyone = _all(send_to_device(list(batches), "cpu"))
    union = {
        _position(counts, who, turn): batch for who, part in enumerate(everyone) for turn, batch in enumerate(part)
    }
    return sorted(union.items()), sum(counts)


def size_of_union(batches: Sequence[Any], everywhere: bool) -> int:
    """Number of batches of all processes, given those of this one."""
    return len(batches) if everywhere or not several() else sum(_all(len(batches)))


def _position(counts: Sequence[int], rank: int, turn: int) -> int:
    return sum(min(count, turn) for count in counts) + sum(count > turn for count in counts[:rank])


def union_of_values(values: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """For each unit the values of all batches, from every process those of its own."""
    if not several():
        return values
    return {name: {at: value for own in _all(values) for at, value in own[name].items()} for name in values}


def union_of_names(names: set[str]) -> set[str]:
    """The names of all processes."""
    return set().union(*_all(names)) if several() else names


def last_of_all(position: int) -> int:
    """The last position that any process has seen."""
    return max(_all(position)) if several() else position


def merge(moments: Moments, last: int, alone: bool) -> Moments:
    """The moments over the samples of all processes, as seen from the position `last`; the same bits everywhere."""
    moments.fade(last)
    if alone or not several():
        return moments
    merged = Moments(moments.means, moments.decay)
    facts: list[tuple[int, float]] = _all((moments.count, moments.total))
    means, spreads = ([_every(tensor) for tensor in halves] for halves in (moments.means, moments.spreads))
    for who, (count, total) in enumerate(facts):
        merged.merge(count, total, [halves[who] for halves in means], [halves[who] for halves in spreads])
    return merged


def broadcast_from_first(value: Told) -> Told:
    """The value of the first process: trained weights may differ in the last bit between machines."""
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _all(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _every(tensor: torch.Tensor) -> list[torch.Tensor]:
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors
