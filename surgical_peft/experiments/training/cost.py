"""Estimates of time and memory before a command trains: a few steps, timed in as many processes as will share it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import psutil
import torch
from rich.console import Console
from torch import nn

from ...rendering import clock
from ..tasks import Examples, spread
from ..tasks.evaluation import Measure
from .workers import WorkerPool, shared_threads

_FEW = 8  # examples on which measuring is timed, or more
_ENOUGH, _LONG = 0.5, 3.0  # seconds that it takes once, and that it may take
_PASSES = 4  # of a model that writes, at least


@dataclass(frozen=True)
class Timing:
    """The cost of one training on this machine, while as many others run as will.

    Attributes:
        whole: seconds, measuring included, where the first layer or all is trained.
        last: the same where the last layer alone is: the layers before it are run once, and have no backward pass.
        step: of `whole`, a single step.
        measure: of `whole`, the measuring.
        start: seconds until a process is ready to train.
        memory: bytes, at most, of its process; on an accelerator what its allocator gave out.
    """

    whole: float
    last: float
    step: float
    measure: float
    start: float
    memory: int

    def seconds(self, depth: float) -> float:
        """Of a training whose first tuned layer lies at `depth`: 0 for the first one, 1 for the last."""
        return self.whole + (self.last - self.whole) * min(1.0, max(0.0, depth))


def depth_of(blocks: Sequence[str], names: Sequence[str], layers: Sequence[str]) -> float:
    """Where the first of some blocks lies: 0 is the first layer, or before it, 1 the last, or after it.

    Args:
        blocks: that are tuned.
        names: all, in the order of execution.
        layers: those of them that are repeated layers.

    Example:
        >>> depth_of(["2", "head"], ["embeddings", "0", "1", "2", "head"], ["0", "1", "2"])
        1.0
    """
    first, last = names.index(layers[0]), names.index(layers[-1])
    at = min((names.index(block) for block in blocks), default=first)
    return min(1.0, max(0.0, (at - first) / max(1, last - first)))


def timed_at_once(jobs: int, console: Console, time_one: Callable[..., Timing], *arguments: Any) -> Timing:
    """What `time_one(*arguments)` finds in as many processes at once: the mean, with the time that they take to start.

    Args:
        jobs: processes; of one alone this process is it.
        console: where to show progress.
        time_one: a function that a worker process can import.
        arguments: for it.
    """
    began = time.perf_counter()
    with shared_threads(jobs), WorkerPool(jobs, console) as pool:
        timings = pool.run("time a few steps", _with_seconds, [(time_one, arguments)] * jobs)
    whole = time.perf_counter() - began
    found = [timing for timing, _ in timings]
    start = max(0.0, whole - max(seconds for _, seconds in timings)) + max(timing.start for timing in found)

    return Timing(
        whole=fmean(timing.whole for timing in found),
        last=fmean(timing.last for timing in found),
        step=fmean(timing.step for timing in found),
        measure=fmean(timing.measure for timing in found),
        start=start,
        memory=max(timing.memory for timing in found),
    )


def measuring_seconds(measure: Callable[[nn.Module, Examples], float], model: nn.Module, examples: Examples) -> float:
    """The seconds that a metric of a model takes on examples: of all, or estimated from so many as take a while.

    Args:
        measure: gives the metric; what takes a moment is done twice, for what is made once is made in the first.
            Answers that the model writes are broken off after a while, and the time for all their tokens is told.
        model: to measure.
        examples: all of them.
    """
    if isinstance(measure, Measure) and measure.tokens:
        few = spread(examples, measure.batch_size)
        return _writing_seconds(measure, model, few, measure.tokens) * len(examples) / len(few)
    few, seconds = spread(examples, _FEW), 0.0
    for _ in range(2):
        seconds = _seconds(measure, model, few)
        if seconds > _ENOUGH:
            break
    more = spread(examples, int(len(few) * _LONG / seconds))
    if len(more) > 2 * len(few):
        few, seconds = more, _seconds(measure, model, more)
    return seconds * len(examples) / len(few)


def _seconds(measure: Callable[[nn.Module, Examples], float], model: nn.Module, examples: Examples) -> float:
    began = time.perf_counter()
    measure(model, examples)
    return time.perf_counter() - began


def _writing_seconds(measure: Measure, model: nn.Module, examples: Examples, tokens: int) -> float:
    """Of one batch of answers, each of so many tokens unless all end sooner."""
    times = [time.perf_counter()]  # then those when a pass ended: the first one reads the prompts, each writes a token

    def note(*given: Any) -> None:
        times.append(time.perf_counter())
        if len(times) > _PASSES and times[-1] - times[0] > _LONG:
            raise _BrokenOff

    hook = model.register_forward_hook(note)
    try:
        return _seconds(measure, model, examples)
    except _BrokenOff:
        written = len(times) - 1
        return times[-1] - times[0] + (tokens - written) * (times[-1] - times[1]) / (written - 1)
    finally:
        hook.remove()


class _BrokenOff(Exception):
    """Enough has been written to tell the time."""


def _with_seconds(time_one: Callable[..., Timing], arguments: tuple[Any, ...]) -> tuple[Timing, float]:
    began = time.perf_counter()
    return time_one(*arguments), time.perf_counter() - began


def shared(seconds: float, jobs: int, longest: float) -> float:
    """The time of trainings of so many seconds together that processes share; none is shorter than the longest."""
    return max(seconds / min(jobs, os.cpu_count() or 1), longest)


def time_in_words(seconds: float, jobs: int, is_bound: bool = False) -> str:
    """A time for so many processes.

    Example:
        >>> time_in_words(90, 2)
        'With 2 jobs: about 1:30 min.'
    """
    return f"With {jobs} job{'s' * (jobs > 1)}: {'at most ' * is_bound}about {clock(seconds)}."


def memory_in_words(memory: int, jobs: int) -> str:
    """The memory of all processes, and what there is.

    Example:
        >>> memory_in_words(600_000_000, 2)
        'Memory: about 1.2 GB, 0.6 GB for each process; this machine has 8.2 GB.'
    """
    if torch.accelerator.is_available():
        _, size = torch.accelerator.get_memory_info()
        where = "the accelerator"
    else:
        size, where = psutil.virtual_memory().total, "this machine"
    each = f", {memory / 1e9:.1f} GB for each process" * (jobs > 1)
    warning = ": too much" * (jobs * memory > size)
    return f"Memory: about {jobs * memory / 1e9:.1f} GB{each}; {where} has {size / 1e9:.1f} GB{warning}."
