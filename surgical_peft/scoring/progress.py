"""Progress of a long run with the time left: a bar on a terminal, lines in a log."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..criteria.budget import Budget, check_steps
from ..errors import SurgicalError
from ..rendering import clock
from ..threads import in_background
from .distributed import is_first

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

EVERY = 10.0  # seconds to the next line of a stage in a log; later a fifth of what it has taken so far
_BAR = 10  # characters
_ROUNDING = 1e-6  # of shares that together are one
AT_MOST = 300.0  # seconds between two lines


@dataclass
class _Stage:
    """How far a stage is.

    Attributes:
        words: what is done.
        total: how much there is; None if that is not known.
        is_bound: whether it may be less.
        done: so far, of which `before` was done before it began.
        note: shown beside it.
    """

    words: str
    total: float | None
    is_bound: bool = False
    before: float = 0.0
    done: float = 0.0
    note: str = ""
    began: float = field(default_factory=time.monotonic)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def count(self) -> str:
        if not self.total:
            return ""
        if isinstance(self.total, int):
            return f"{min(self.total, int(self.done + _ROUNDING))} of {self.total}"
        return f"{min(1.0, self.done / self.total):.0%}"

    @property
    def left(self) -> str:
        if not self.total or not self.before < self.done < self.total:
            return ""
        left = self.seconds / (self.done - self.before) * max(0.0, self.total - self.done)
        return f"{'at most ' * self.is_bound}about {clock(left)} left"

    def __str__(self) -> str:
        return f"{self.words}: {_joined(self.count, self.note, clock(self.seconds), self.left)}"

    def line(self, width: int) -> str:
        """The stage in one line of a terminal: what there is no room for is left out, the least important first."""
        bar = "" if not self.total else _bar(self.done / self.total)
        gone = clock(self.seconds)
        tried = [
            f"{self.words} {bar} {_joined(self.count, self.note, gone, self.left)}",
            f"{self.words} {bar} {_joined(self.count, self.note, self.left or gone)}",
            f"{self.words}: {_joined(self.count, self.note, self.left or gone)}",
            f"{self.words}: {_joined(self.count, self.left or gone)}",
            f"{bar} {_joined(self.count, self.left or gone)}",
        ]
        return next((line for line in tried if len(line) <= width), gone)


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _bar(share: float) -> str:
    full = min(_BAR, int(_BAR * share))
    return "█" * full + "░" * (_BAR - full)


class Stages:
    """Shows the progress of one stage after another, with the time left.

    On a terminal a bar; elsewhere a line when a stage begins, and more while it lasts, ten seconds or more apart.

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
        self._stage: _Stage | None = None
        self._bar: Live | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def begin(self, words: str, total: float | None = None, done: float = 0, is_bound: bool = False) -> None:
        """Begin a stage.

        Args:
            words: what is done.
            total: how much there is to do; None: that is not known.
            done: how much of it is done before.
            is_bound: whether it may be less than `total`.
        """
        self.end()
        self._stage = _Stage(words, total, is_bound, before=done, done=done)
        if self.console.quiet:
            return
        if not self.console.is_interactive:
            self._print(words)
            with suppress(SurgicalError):  # no room for a thread: there will be fewer lines
                in_background(self._log, self._stage)
            return
        from rich.live import Live
        from rich.text import Text

        def drawn(stage: _Stage = self._stage) -> Text:
            return Text(stage.line(self.console.width), no_wrap=True)

        self._bar = Live(get_renderable=drawn, console=self.console, transient=True, refresh_per_second=10)
        self._bar.start()

    def advance(self, amount: float = 1) -> None:
        """Advance the stage by `amount`."""
        if self._stage is not None:
            self._stage.done += amount

    def reach(self, done: float) -> None:
        """Bring the stage to `done` of its total."""
        if self._stage is not None:
            self._stage.done = done

    def note(self, words: str) -> None:
        """Show some words beside the stage from now on, such as the loss."""
        if self._stage is not None:
            self._stage.note = words

    def say(self, words: str) -> None:
        """Print a line that stays; the stage is over."""
        self.end()
        self._print(words)

    def end(self) -> None:
        """End the stage."""
        if self._stage is not None:
            self._stage.over.set()
            self._stage = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, words: str) -> None:
        self.console.print(words, markup=False, highlight=False, soft_wrap=True)

    def _log(self, stage: _Stage) -> None:
        wait = EVERY
        while not stage.over.wait(wait):
            self._print(str(stage))
            wait = min(max(EVERY, stage.seconds / 5), AT_MOST)


class Counted:
    """Examples that advance the stage as they are read, for what takes all of them once.

    Example:
        >>> stages.begin("measure", len(examples))
        >>> task.measure(model, Counted(examples, stages))
    """

    def __init__(self, examples: Any, stages: Stages) -> None:
        self._examples, self._stages = examples, stages

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Any:
        self._stages.advance()
        return self._examples[index]


class TrainingStage(TrainerCallback):
    """Shows the steps of a training, and its losses as Trainer logs them."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._losses: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a stage."""
        self._began, self._before = time.monotonic(), state.global_step
        self._stages.begin("train, steps", state.max_steps, done=self._before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by a step."""
        self._stages.advance()

    def on_log(  # type: ignore[override]  # Trainer gives it the logs
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if "loss" in logs:
            self._losses.append(float(logs["loss"]))
            self._stages.note(f"loss {self._losses[-1]:.4g}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how long it took, and how far the loss fell."""
        losses = f", loss {self._losses[0]:.4g} at first, {self._losses[-1]:.4g} at last" if self._losses else ""
        steps = state.global_step - self._before
        self._stages.say(f"trained {steps} steps in {clock(time.monotonic() - self._began)}{losses}")


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
            told.say(f"{what}: took {spending.spent:.4g} training steps ({clock(time.perf_counter() - began)})")
