"""Detects changes of a weight that its optimizer did not make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_DENSE = (1,)  # the stride of neighboring entries


def local(tensor: Tensor) -> Tensor:
    """This process's share of what FSDP2 has sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def version(weight: Tensor) -> tuple[int, int]:
    """Another one after the weight was changed, but for writes to `weight.data`, which torch does not count."""
    here = local(weight)
    return here._version, here.data_ptr()


def begin_alike(weights: Sequence[Tensor], masters: Sequence[Tensor]) -> bool:
    """Whether the first entries of each weight are what its master rounds to.

    They tell of weights that were copied in through `data`; to look at all entries takes as long as a step of Adam.
    """
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for weight, master in zip(weights, masters, strict=True):
        first = (min(64, weight.numel()),)
        begins, rounded = kinds.setdefault((weight.device, weight.dtype), ([], []))
        begins.append(weight.as_strided(first, _DENSE))
        rounded.append(master.as_strided(first, _DENSE))
    return all(
        torch.equal(torch.cat(begins), torch.cat(rounded).to(dtype)) for (_, dtype), (begins, rounded) in kinds.items()
    )
