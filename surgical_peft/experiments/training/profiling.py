"""Time and memory of a training step of each method, measured in turns."""

from __future__ import annotations

import math
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...threads import in_background
from .job_progress import part_of_job

_EVERY = 0.02  # seconds between two looks at the process
SHARE = 0.05  # of the trainings, that the timing of their steps may cost; one round there always is
FEW, MOST = 3, 9  # rounds
SECONDS = 20.0  # after which there are no more than the few
Watch = Callable[[nn.Module], TrainerCallback]
Train = Callable[[Watch], Any]


def step_costs(trainings: Mapping[str, Train], planned_steps: float = math.inf) -> dict[str, dict[str, Any]]:
    """Milliseconds and peak bytes of a training step, by name.

    Args:
        trainings: each trains a few steps of every epoch with the callback that it makes of what is trained. They
            take turns, back and forth, so that all of them see the same changes of the machine, after one round that
            counts memory and warms up.
        planned_steps: of all trainings that this serves. There are at most `MOST` rounds, after `SECONDS` at most
            `FEW`, and beyond the first only those that cost no more than `SHARE` of these steps.

    Returns:
        `rounds`: the milliseconds in each: of the fastest step of an epoch, which other work on the machine has held
        up least, and the mean over the epochs, since a policy may train other parts in others. `ms`: their median.
        `peak_bytes`: of an accelerator what its allocator gave out; else of all tensors together.

    Example:
        >>> step_costs({"full": lambda watch: runner.train(wrap, range(96), watch=watch)})["full"]["ms"]
        33.1
    """
    start, peaks = time.perf_counter(), {}
    few = 2 * len(trainings)  # a round that counts memory, and one that there always is; whether more is seen then
    for place, name in enumerate(trainings):
        with part_of_job(place / few, (place + 1) / few):
            peaks[name] = float(_peak(trainings[name]))
    rounds: dict[str, list[float]] = {name: [] for name in trainings}
    order, began = list(trainings), time.perf_counter()
    for count in range(1, MOST + 1):
        for place, name in enumerate(order, len(order)):
            with part_of_job(place / few, (place + 1) / few):
                rounds[name].append(_milliseconds(trainings[name]))
        order.reverse()
        now = time.perf_counter()
        allowed = SHARE * planned_steps * statistics.fmean(map(min, rounds.values())) / 1000
        if now - start + (now - began) / count > allowed or (count >= FEW and now - began > SECONDS):
            break
    return {
        name: {"ms": statistics.median(rounds[name]), "rounds": rounds[name], "peak_bytes": peaks[name]}
        for name in trainings
    }


def ms_ratio(cost: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The time of a step as a part of another's: the median over the rounds of the ratio in each.

    Two steps of one round see the same machine, those of different rounds need not. Costs that were measured before
    rounds were kept have one ratio.

    Example:
        >>> ms_ratio({"ms": 4.0, "rounds": [2.0, 4.0, 9.0]}, {"ms": 8.0, "rounds": [4.0, 8.0, 10.0]})
        0.5
    """
    if "rounds" not in cost or "rounds" not in other:
        return cost["ms"] / other["ms"]
    return statistics.median(ms / base for ms, base in zip(cost["rounds"], other["rounds"], strict=True))


def _milliseconds(train: Train) -> float:
    clock = _Clock()
    train(lambda wrapped: clock)
    return 1000 * statistics.fmean(min(epoch) for epoch in clock.epochs)


def _peak(train: Train) -> int:
    if torch.accelerator.is_available():
        with PeakMemory() as peak:
            train(lambda wrapped: TrainerCallback())
        return peak.bytes
    tensors = LiveTensors()
    train(lambda wrapped: _Counting(tensors, wrapped))
    return tensors.peak


class _Clock(TrainerCallback):
    """Notes the seconds of each step, by epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[float]] = []

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.epochs.append([])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _wait()
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _wait()
        self.epochs[-1].append(time.perf_counter() - self._began)


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class _Counting(TrainerCallback):
    """Counts the tensors that live while a model is trained."""

    def __init__(self, tensors: LiveTensors, model: nn.Module) -> None:
        self._tensors, self._model = tensors, model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._tensors.count(tensor)
        self._tensors.__enter__()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tensors.__exit__(None, None, None)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors made inside, as long as they live; those from before are told by `count`.

    Attributes:
        bytes: alive now.
        peak: the most there were.

    Example:
        >>> with LiveTensors() as tensors:
        ...     loss.backward()
        >>> tensors.peak
        3145728
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, Any] = {}

    def count(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result


class PeakMemory:
    """Measures the highest memory, in bytes, while it is entered.

    On an accelerator all that its allocator gave out. On the CPU the resident size of the whole process, looked at
    every 20 ms: its libraries and data count too, and freed memory that it has not given back, so trainings that
    follow each other in one process differ by little there.

    Attributes:
        bytes: what was found, once it is left.

    Example:
        >>> with PeakMemory() as peak:
        ...     trainer.train()
        >>> peak.bytes
        734003200
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        self._on_accelerator = torch.accelerator.is_available()
        if self._on_accelerator:
            torch.accelerator.reset_peak_memory_stats()
            return self
        self._process = psutil.Process()
        self._done = threading.Event()
        self._look()
        in_background(self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_accelerator:
            self.bytes = torch.accelerator.max_memory_allocated()
            return
        self._look()
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)
