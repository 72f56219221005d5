"""Names of single rows of a tensor: `experts.down_proj[3]` is the fourth expert of a stacked weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_ROW = re.compile(r"(?P<stacked>.+)\[(?P<index>\d+)\]")


def split_row(name: str) -> tuple[str, int] | None:
    """The stacked tensor and the index in the name of a row; None for the name of a whole tensor.

    Example:
        >>> split_row("mlp.experts.down_proj[3]"), split_row("mlp.fc1.weight")
        (('mlp.experts.down_proj', 3), None)
    """
    match = _ROW.fullmatch(name)
    return (match["stacked"], int(match["index"])) if match else None


def tensor_of(name: str) -> str:
    """The name of the whole tensor that `name` is, or is a row of."""
    row = split_row(name)
    return row[0] if row else name


def pick(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name, or the row of the one that holds it.

    Example:
        >>> pick({"experts.up": torch.zeros(4, 2, 2)}, "experts.up[3]").shape
        torch.Size([2, 2])
    """
    row = split_row(name)
    return tensors[row[0]][row[1]] if row else tensors[name]


def with_rows(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """`tensors`, and those of `names` that are rows of them."""
    rows = {name: row for name in names if (row := split_row(name)) and row[0] in tensors}
    return {**tensors, **{name: tensors[at][index] for name, (at, index) in rows.items() if index < len(tensors[at])}}
