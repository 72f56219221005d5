"""What modules return, taken apart into a row of tensors for each example and put together for another batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .examples import Sequences

Row = list[Tensor]


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, in their order; what else it holds is left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for member in output.values():
            yield from tensors_in(member)
    elif isinstance(output, tuple | list):
        for member in output:
            yield from tensors_in(member)


def is_plain(output: Any) -> bool:
    """True for tensors in tuples, lists and outputs of transformers: what can be put together again."""
    if isinstance(output, ModelOutput):
        return all(is_plain(member) for member in output.values())
    if type(output) in (tuple, list):
        return all(is_plain(member) for member in output)
    return output is None or isinstance(output, Tensor)


def map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """A plain output with `function` of each of its tensors."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: map_tensors(function, member) for name, member in output.items()})
    if type(output) in (tuple, list):
        return type(output)(map_tensors(function, member) for member in output)
    return function(output) if isinstance(output, Tensor) else output


@dataclass(frozen=True)
class Form:
    """How a module's output for a batch is made of one row of tensors an example.

    Attributes:
        template: an output with tensors that have no entries.
        shapes: of the tensors, without examples.
        sequences: for each tensor the sequence that its second dimension goes along with, or None.
    """

    template: Any
    shapes: tuple[tuple[int, ...], ...]
    sequences: tuple[str | None, ...]

    @classmethod
    def of(cls, output: Any, sequences: Sequence[str | None]) -> Form:
        """The form of an output."""
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors_in(output))
        return cls(map_tensors(lambda tensor: tensor.new_empty(0), output), shapes, tuple(sequences))

    def rows(self, output: Any, padded: Mapping[str, Sequences]) -> list[Row] | None:
        """A row for each example, on the CPU and without padding; None if the output is of another form."""
        tensors = list(tensors_in(output))
        empty = list(tensors_in(self.template))
        if len(tensors) != len(empty) or any(a.dtype != b.dtype for a, b in zip(tensors, empty, strict=True)):
            return None
        rows: list[Row] = [[] for _ in range(len(tensors[0]))]
        for tensor, which in zip(tensors, self.sequences, strict=True):
            if len(tensor) != len(rows) or (which and tensor.shape[1] != padded[which].length):
                return None
            for at, row in enumerate(rows):
                part = tensor[at] if which is None else tensor[at, slice(*padded[which].spans[at])]
                row.append(part.detach().to("cpu", copy=True).contiguous())
        return rows

    def output(self, rows: Sequence[Row], padded: Mapping[str, Sequences], device: torch.device) -> Any | None:
        """The output for a batch of examples, zero where it is padded; None if the rows do not fit together."""
        columns = zip(*rows, strict=True)
        tensors = []
        for column, which in zip(columns, self.sequences, strict=True):
            if which is None:
                if len({row.shape for row in column}) > 1:
                    return None
                tensors.append(torch.stack(column).to(device))
                continue
            spans, length = padded[which].spans, padded[which].length
            whole = column[0].new_zeros(len(column), length, *column[0].shape[1:])
            for target, row, span in zip(whole, column, spans, strict=True):
                if len(row) != span[1] - span[0]:
                    return None
                target[slice(*span)] = row
            tensors.append(whole.to(device))
        each = iter(tensors)
        return map_tensors(lambda _: next(each), self.template)

    def row_bytes(self, padded: Mapping[str, Sequences]) -> int:
        """The bytes of the row of the first example of a batch."""
        total = 0
        for tensor, shape, which in zip(tensors_in(self.template), self.shapes, self.sequences, strict=True):
            first, after = padded[which].spans[0] if which else (0, shape[0] if shape else 1)
            total += tensor.element_size() * (after - first) * math.prod(shape[1:])
        return total

    def unknown(self, size: int, padded: Mapping[str, Sequences]) -> Any:
        """An output in which all numbers are NaN: whoever reads it cannot overlook that. It takes no memory."""
        each = iter(zip(self.shapes, self.sequences, strict=True))

        def poison(tensor: Tensor) -> Tensor:
            shape, which = next(each)
            shape = shape if which is None else (padded[which].length, *shape[1:])
            return tensor.new_full((), float("nan")).expand(size, *shape)

        return map_tensors(poison, self.template)
