"""How much of a job is done: told by what runs in it, deep inside or in another process, to who waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass
class _Job:
    """The job that this process does.

    Attributes:
        tell: called with what is done since the last call, as a share of the job.
        span: the part of the job, from 0 to 1, that reports are of.
        reached: how much is done.
    """

    tell: Callable[[float], None]
    span: tuple[float, float] = (0.0, 1.0)
    reached: float = 0.0

    def reach(self, done: float) -> None:
        if done > self.reached:
            self.tell(done - self.reached)
            self.reached = done


_job: _Job | None = None


@contextmanager
def telling(tell: Callable[[float], None]) -> Iterator[None]:
    """Inside is one job: `tell` is called with each share of it that is done, together 1.

    Example:
        >>> with telling(stages.advance):
        ...     train_once()
    """
    global _job
    before, _job = _job, _Job(tell)
    try:
        yield
        _job.reach(1.0)
    finally:
        _job = before


@contextmanager
def part_of_job(first: float, last: float) -> Iterator[None]:
    """Inside is a part of the job, from the share `first` to the share `last`."""
    if _job is None:
        yield
        return
    before = _job.span
    width = before[1] - before[0]
    _job.span = before[0] + first * width, before[0] + last * width
    try:
        yield
        _job.reach(_job.span[1])
    finally:
        _job.span = before


def report_progress(done: float) -> None:
    """Tell how much of the job, or of the part of it, is done, from 0 to 1; outside of a job nobody asks."""
    if _job is not None:
        first, last = _job.span
        _job.reach(first + min(1.0, done) * (last - first))


class ReportedSteps(TrainerCallback):
    """Tells of each step of a training."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell how many of all steps are done."""
        report_progress(state.global_step / max(1, state.max_steps))
