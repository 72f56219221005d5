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
        trainings: each trains a few steps of every epoch, two or more, with the callback that it makes of what is
            trained. They take turns, back and forth, so that all of them see the same changes of the machine.
        planned_steps: of all trainings that this serves. There are at most `MOST` rounds, after `SECONDS` at most
            `FEW`, and beyond the first only those with which all cost no more than `SHARE` of these steps.

    Returns:
        `rounds`: the milliseconds of a step in each. Every second step of an epoch is timed: the median of those that
        train the same weights, and the mean over these medians, by the number of steps, since a policy may train
        other weights in other epochs and steps. `ms`: the median of `rounds`. `peak_bytes`: of an accelerator what
        its allocator gave out; else of all tensors together, counted in the other steps of the first round.

    Example:
        >>> step_costs({"full": lambda watch: runner.train(wrap, range(64), watch=watch)})["full"]["ms"]
        33.1
    """
    rounds: dict[str, list[float]] = {name: [] for name in trainings}
    peaks: dict[str, float] = {}
    order, began = list(trainings), time.perf_counter()
    for count in range(1, MOST + 1):
        share = 0.5**count / len(order)  # of the progress; how many rounds there will be is not known
        for place, name in enumerate(order):
            meter = _Meter(counts_memory=count == 1)
            done = 1 - 0.5 ** (count - 1) + place * share
            with part_of_job(done, done + share):
                trainings[name](meter.of)
            rounds[name].append(1000 * meter.seconds())
            peaks.setdefault(name, float(meter.peak))
        order.reverse()
        now = time.perf_counter()
        allowed = SHARE * planned_steps * statistics.fmean(map(min, rounds.values())) / 1000
        if (now - began) * (count + 1) / count > allowed or (count >= FEW and now - began > SECONDS):
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


class _Meter(TrainerCallback):
    """Notes the seconds and the trained weights of each step, by epoch; in every second one it counts tensors.

    Attributes:
        peak: the most bytes that a step took, or takes when it finds the optimizer's state there already.
    """

    def __init__(self, counts_memory: bool) -> None:
        self.peak = 0
        self._tensors = LiveTensors()
        self._on_accelerator = torch.accelerator.is_available()
        self._counts = counts_memory and not self._on_accelerator
        self._epochs: list[list[tuple[frozenset[int], float]]] = []

    def of(self, model: nn.Module) -> _Meter:
        """This callback, for the training of a model."""
        self._model = model
        return self

    def seconds(self) -> float:
        """Of a step: see `step_costs`."""
        alike = [
            [seconds for trained, seconds in steps if trained == weights]
            for epoch in self._epochs
            if (steps := epoch[1::2] or epoch)
            for weights in {trained for trained, _ in steps}
        ]
        return sum(len(steps) * statistics.median(steps) for steps in alike) / sum(map(len, alike))

    def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
        if self._on_accelerator:
            torch.accelerator.reset_peak_memory_stats()
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._tensors.count(tensor)

    def on_train_end(self, *given: Any, **kwargs: Any) -> None:
        if self._on_accelerator:
            self.peak = torch.accelerator.max_memory_allocated()

    def on_epoch_begin(self, *given: Any, **kwargs: Any) -> None:
        self._epochs.append([])

    def on_step_begin(self, *given: Any, **kwargs: Any) -> None:
        self._before = self._tensors.peak = self._tensors.bytes
        if self._is_counted:
            self._tensors.__enter__()
        self._wait()
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, *given: Any, **kwargs: Any) -> None:
        self._used = self._tensors.peak - self._before
        weights = enumerate(self._model.parameters())
        self._trained = frozenset(number for number, weight in weights if weight.grad is not None)

    def on_step_end(self, *given: Any, **kwargs: Any) -> None:
        self._wait()
        seconds = time.perf_counter() - self._began
        if self._is_counted:
            self._tensors.__exit__(None, None, None)
            self.peak = max(self.peak, self._tensors.peak, self._tensors.bytes + self._used)
        self._epochs[-1].append((self._trained, seconds))

    @property
    def _is_counted(self) -> bool:
        return self._counts and len(self._epochs[-1]) % 2 == 0

    def _wait(self) -> None:
        if self._on_accelerator:
            torch.accelerator.synchronize()


class StepClock(TrainerCallback):
    """Notes the seconds from step to step, and ends a training after `long` seconds and three steps.

    Attributes:
        seconds: of each step, with the batch that it waits for; the first includes all that a training begins with.
    """

    def __init__(self, long: float) -> None:
        self._long = long
        self.seconds: list[float] = []

    def on_train_begin(self, *given: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the seconds of this step, and tell whether it is the last."""
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now
        control.should_training_stop |= len(self.seconds) >= 3 and sum(self.seconds) > self._long


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
