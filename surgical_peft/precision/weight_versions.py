"""Detects changes of a weight that its optimizer did not make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's share of what FSDP2 has sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def version(weight: Tensor) -> tuple[int, int]:
    """Another one after the weight was changed, but for writes to `weight.data`, which torch does not count."""
    return local(weight)._version, local(weight).data_ptr()


def begin_alike(weights: list[Tensor], masters: list[Tensor]) -> bool:
    """Whether the first entries of each weight are what its master rounds to.

    They tell of weights that were copied in through `data`; to look at all entries takes as long as a step of Adam.
    """
    kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for weight, master in zip(weights, masters, strict=True):
        few = ((min(64, weight.numel()),), (1,))
        kinds.setdefault((weight.device, weight.dtype), []).append((weight.as_strided(*few), master.as_strided(*few)))
    for (_, dtype), pairs in kinds.items():
        begin, rounded = (torch.cat(each) for each in zip(*pairs, strict=True))
        if not torch.equal(begin, rounded.to(dtype)):
            return False
    return True
