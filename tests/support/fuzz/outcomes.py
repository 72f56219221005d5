"""Runs generated cases and counts their outcomes: a clear error, accepted and right, or anything else."""

from __future__ import annotations

import faulthandler
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from surgical_peft import SurgicalError

LONGEST = 10.0  # seconds that a case may take
_LONGEST_MESSAGE = 5000  # characters of an error that somebody is to read


class TookTooLong(BaseException):
    """Not an `Exception`: no `except` on the way may keep it."""


@dataclass(frozen=True)
class Family:
    """A kind of input.

    Attributes:
        name: of the family.
        cases: gives plain data that describe a case.
        check: does a case in an empty folder. Raises what the library raises, and `AssertionError` where something was
            accepted and is not right.
    """

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any, Path], None]


@dataclass
class Tally:
    """The outcomes of a family's cases; `others` has a line for each that is neither an error of ours nor right."""

    family: str
    clear: int = 0
    right: int = 0
    others: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """The number of cases."""
        return self.clear + self.right + len(self.others)


def fault_of(family: Family, case: Any, longest: float = LONGEST) -> tuple[bool, str | None]:
    """True if a case was refused by a clear error; and what is wrong with the outcome, if anything is."""
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _time_limit(longest):
            warnings.simplefilter("ignore")
            family.check(case, Path(folder))
    except SurgicalError as error:
        unclear = not str(error).strip() or len(str(error)) > _LONGEST_MESSAGE
        return True, f"an error of {len(str(error)):,} characters" if unclear else None
    except TookTooLong:
        return False, f"took more than {longest:g} seconds"
    except Exception as error:  # anything else that comes out is what is looked for
        place = next(
            (f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__))), ""
        )
        return False, f"{type(error).__name__} at {place}: {str(error)[:300]}"
    return False, None


def run(family: Family, count: int, start: int = 0) -> Tally:
    """The outcomes of `count` cases, the same ones for the same `start`."""
    tally = Tally(family.name)

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(family.cases)
    def every(case: Any) -> None:
        is_clear, fault = fault_of(family, case)
        if fault is not None:
            tally.others.append(f"{case!r:.600}: {fault}")
        elif is_clear:
            tally.clear += 1
        else:
            tally.right += 1

    every()
    return tally


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)  # code that no signal interrupts
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
