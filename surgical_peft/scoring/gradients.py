"""Reads the gradients of units as the backward pass delivers them, and frees each unit's at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..criteria.criterion import Criterion, Moments, Needs, can_train, is_zero, not_finite, whole
from ..errors import SurgicalError
from .distributed import last_of_all, merge, union_of_values
from .offload import Lent, arrivals

Units = Mapping[str, dict[str, nn.Parameter]]  # for each unit its weights by their names in the bare model
Receiver = Callable[[str, list[Tensor], list[Tensor], int], None]


class GradientReader:
    """Passes the gradients of each unit to `receive(unit, weights, grads, sample)` and frees them.

    Memory: one unit's gradients. Under FSDP2, where gradients arrive sharded, all shards of a process at once, and one
    unit's weights and gradients whole.

    Attributes:
        reached: the units that had a gradient other than zero in some sample; the others have no score.
    """

    def __init__(self, units: Units, receive: Receiver, lent: list[Lent], kind: str) -> None:
        self.receive = receive
        self.kind = kind
        self.sample = 0
        self.reached: set[str] = set()
        self._units = units
        self._unit_of = {path: name for name, unit in units.items() for path in unit}
        self._lent = lent
        self._stored = {weight.path: weight for weight in lent}
        # Where the gradient of a weight arrives: at itself, or at each of the tensors that it was lent as.
        self._places = {
            path: [] if weight.is_meta else [weight] for unit in units.values() for path, weight in unit.items()
        }
        self._path_of = {id(weight): path for path, places in self._places.items() for weight in places}
        self._awaited: dict[str, set[int]] = {}
        self._sharded = any(isinstance(weight, DTensor) for unit in units.values() for weight in unit.values())
        self._loans: list[tuple[str, nn.Parameter, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[GradientReader]:
        """Read the gradients of backward passes inside."""
        resident = [] if self._sharded else [weight for places in self._places.values() for weight in places]
        hooks = [weight.register_post_accumulate_grad_hook(self._take) for weight in resident]
        try:
            with arrivals(self._lent, self._arrived):
                yield self
        finally:
            self._end_loans()
            for hook in hooks:
                hook.remove()

    def _arrived(self, path: str, weight: nn.Parameter) -> None:
        if can_train(weight):
            weight.requires_grad_(path in self._unit_of)
        if path in self._unit_of and id(weight) not in self._path_of:
            self._places[path].append(weight)
            self._path_of[id(weight)] = path
            self._loans.append((path, weight, weight.register_post_accumulate_grad_hook(self._take)))

    def _end_loans(self) -> None:
        for path, weight, hook in self._loans:
            hook.remove()
            del self._path_of[id(weight)]
            self._places[path] = [place for place in self._places[path] if place is not weight]
        self._loans = []

    def read(self, loss: Tensor, sample: int) -> None:
        """Run the backward pass of `loss` and pass on its gradients."""
        self.sample = sample
        reached = _leaves(loss)
        for name, unit in self._units.items():
            places = {id(weight) for path in unit for weight in self._places[path]}
            self._awaited[name] = places & reached or places
        if loss.requires_grad:  # else no unit of this pass has a part in it
            loss.backward()
        for name in list(self._awaited):  # units that take no part in this sample, or are sharded
            self._finish(name)
        self._end_loans()
        if not loss.isfinite():  # its gradient may be zero, as that of a mean over nothing
            raise not_finite("loss", self.kind, sample)

    def _take(self, weight: Tensor) -> None:
        name = self._unit_of[self._path_of[id(weight)]]
        if name not in self._awaited:
            raise SurgicalError(
                f"{name!r} got a gradient that the graph did not announce, so its score would be wrong: with gradient "
                "checkpointing, use use_reentrant=False."
            )
        self._awaited[name].discard(id(weight))
        if not self._awaited[name]:
            self._finish(name)

    def _finish(self, name: str) -> None:
        del self._awaited[name]
        weights, grads = [], []
        for path in self._units[name]:
            places = self._places[path] or [self._stored[path].loaded()]
            weight = places[0]
            arrived = [place.grad for place in places if place.grad is not None]
            nothing = torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)
            weights.append(whole(weight.detach()))
            grads.append(whole(reduce(torch.add, arrived) if arrived else nothing))
        with torch.no_grad():
            if name not in self.reached and not all(map(is_zero, grads)):
                self.reached.add(name)
            self.receive(name, weights, grads, self.sample)
        for path in self._units[name]:
            for place in self._places[path]:
                place.grad = None


class PerBatch:
    """Receiver for a criterion on the gradients of each batch."""

    def __init__(self, score: Criterion, units: Iterable[str]) -> None:
        self.score = score
        self.values: dict[str, dict[int, float]] = {name: {} for name in units}

    def take(self, name: str, weights: list[Tensor], grads: list[Tensor], sample: int) -> None:
        """Score one unit on one batch."""
        self.values[name][sample] = as_finite_float(self.score(weights, grads), self.score, name, sample)

    def result(self, alone: bool) -> dict[str, float]:
        """The mean over the batches, for each unit; over those of all processes unless this one had them `alone`."""
        values = self.values if alone else union_of_values(self.values)
        return {name: float(np.mean([scores[at] for at in sorted(scores)])) for name, scores in values.items()}


class OverSamples:
    """Receiver for a criterion on moments."""

    def __init__(self, score: Criterion, needs: Needs, units: Units) -> None:
        self.score, self.needs = score, needs
        self.moments: dict[str, list[Moments]] = {name: [] for name in units}
        self._weights = {name: [weight.detach() for weight in unit.values()] for name, unit in units.items()}
        self._last = -1

    def take(self, name: str, weights: list[Tensor], grads: list[Tensor], sample: int) -> None:
        """Add one sample to the moments of one unit."""
        if not all(bool(torch.isfinite(grad).all()) for grad in grads):
            raise not_finite(f"gradient of {name!r}", kind_of(self.needs), sample)
        if not self.moments[name]:
            self.moments[name] = self._empty(weights)
            self._weights[name] = weights
        self.moments[name][sample % self.needs.parts].update(grads, sample)
        self._last = max(self._last, sample)

    @torch.no_grad()
    def result(self, alone: bool) -> dict[str, float]:
        """The criterion of each unit, over the samples of all processes unless this one had them `alone`."""
        last = self._last if alone else last_of_all(self._last)
        values = {}
        for name, moments in self.moments.items():
            parts = [merge(part, last, alone) for part in moments or self._empty(self._weights[name])]
            if any(part.count == 0 for part in parts):
                raise SurgicalError(
                    f"{name_of(self.score)} compares {self.needs.parts} parts of the data and needs as many batches: "
                    "give a larger num_batches, or smaller batches."
                )
            values[name] = as_finite_float(self.score(self._weights[name], *parts), self.score, name)
            self.moments[name] = []  # freed
        return values

    def _empty(self, weights: Sequence[Tensor]) -> list[Moments]:
        return [Moments(weights, self.needs.decay) for _ in range(self.needs.parts)]


def kind_of(needs: Needs) -> str:
    """The word for one sample of a criterion, for messages: `batch` or `example`."""
    return "batch" if needs.samples == "batches" else "example"


def as_finite_float(value: Any, criterion: Criterion, name: str, sample: int | None = None) -> float:
    """`value` as a float.

    Raises:
        SurgicalError: it is not a number, or not a finite one.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise SurgicalError(
            f"the criterion {name_of(criterion)} returned {value!r} for {name!r}, a {type(value).__name__}: it must "
            "return one number, larger = tune it."
        )
    if not np.isfinite(value):
        where = f" in batch {sample}" if sample is not None else ""
        raise SurgicalError(
            f"the gradient of {name!r}{where} gives the score {value}: it is NaN or infinite. Look "
            "at that batch for bad inputs or labels, or score in float32 or bfloat16 instead of float16."
        )
    return float(value)


def name_of(criterion: Criterion) -> str:
    """The name of a criterion with its settings: `fisher`, or `package.module:name` for the user's own."""
    function: Any = criterion
    settings: dict[str, Any] = {}
    while hasattr(function, "func"):  # functools.partial
        settings = {**function.keywords, **settings}
        function = function.func
    function = function if hasattr(function, "__qualname__") else type(function)
    package = "surgical_peft.criteria."
    is_ours = function.__module__.startswith(package)
    name = function.__name__ if is_ours else f"{function.__module__}:{function.__qualname__}"
    return name + (f"({', '.join(f'{key}={value}' for key, value in settings.items())})" if settings else "")


def _leaves(loss: Tensor) -> set[int]:
    """`id`s of the parameters that the backward pass will reach: an expert without a token in the batch is not one."""
    leaves: set[int] = set()
    seen, ahead = {loss.grad_fn}, [loss.grad_fn]
    while ahead:
        node: Any = ahead.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        ahead += new
    return leaves
