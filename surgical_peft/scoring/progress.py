"""Progress of a long run: on a terminal a bar with the time left, elsewhere a line for each stage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..criteria.budget import Budget, check_steps
from .distributed import is_first

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Stages:
    """Shows the progress of one stage after another.

    Attributes:
        console: where to; the default is the standard error, and nowhere if transformers' progress bars are switched
            off (`transformers.utils.logging.disable_progress_bar()`). Of several processes only the first shows it.

    Example:
        >>> with Stages(console) as stages:
        ...     stages.begin("train", 100)
        ...     stages.advance(1)
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        is_told = (console or logging.is_progress_bar_enabled()) and is_first()
        self.console = (console or Console(stderr=True)) if is_told else Console(stderr=True, quiet=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end()

    def begin(self, words: str, total: float | None = None) -> None:
        """Begin a stage; without a `total` its length is unknown."""
        self._end()
        if self.console.quiet or not self.console.is_terminal:
            self.say(words)
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._task = self._bar.add_task(words, total=total)
        self._bar.start()

    def advance(self, amount: float = 1) -> None:
        """Advance the stage by `amount`."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def say(self, words: str) -> None:
        """Print a line that stays."""
        self._end()
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None


class TrainingStage(TrainerCallback):
    """Shows the steps of a training."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a stage."""
        self._stages.begin(f"train for {state.max_steps} steps", state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by a step."""
        self._stages.advance()


@contextmanager
def counted(budget: float | Budget | None, what: str, stages: Stages | None = None) -> Iterator[Budget]:
    """The budget of the work inside, printed before and after; a `Budget` is passed through.

    Raises:
        SurgicalError: not a finite number of steps above 0.
    """
    if isinstance(budget, Budget):
        yield budget
        return
    limit = math.inf if budget is None else check_steps("budget", budget)
    with stages or Stages() as told:
        spending = Budget(limit, on_stage=told.begin, on_spend=told.advance)
        if spending.is_given:
            told.say(f"{what}: at most {spending.steps:.4g} training steps")
        began = time.perf_counter()
        yield spending
        if spending.spent:
            told.say(f"{what}: took {spending.spent:.4g} training steps ({time.perf_counter() - began:.0f} s)")
