"""The ways in which a command ends early: with one line and an exit code."""

from __future__ import annotations

import _thread
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import typer
from rich.console import Console

from ..errors import SurgicalError, machine_fault, reason_of
from ..threads import in_background

_SOON = 0.05  # seconds
_KEPT = {  # of a command that was interrupted
    "train": "What was kept before is still there.",
    "search": "Finished trainings are kept in the study: the same command goes on.",
    "compare": "Finished trainings are kept in the folder of the results: the same command goes on.",
}


@contextmanager
def interrupts_in_one_line(context: Any = None) -> Iterator[None]:
    """Inside, Ctrl-C ends the process with one line and exit code 130.

    Args:
        context: of typer, once it is known which command runs.
    """
    before = sys.unraisablehook
    sys.unraisablehook = partial(_interrupt_again, before)
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = str(stop) or _KEPT.get(context and context.invoked_subcommand, "Nothing is kept.")
        errors = Console(stderr=True, soft_wrap=True)
        errors.print(f"interrupted. {kept}", markup=False, highlight=False)
        raise typer.Exit(130) from None
    finally:
        sys.unraisablehook = before


def _interrupt_again(otherwise: Callable[[Any], None], ignored: Any) -> None:
    """Python ignores Ctrl-C in a finalizer and the like, which would go on as if nobody had pressed it."""
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        otherwise(ignored)
        return

    def press() -> None:
        time.sleep(_SOON)  # not before the finalizer has ended
        _thread.interrupt_main()

    in_background(press)


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """Inside, an error that the user or the machine makes ends the process with one line and exit code 2.

    Args:
        debug: leave its traceback.
    """
    try:
        yield
    except Exception as error:
        text = None if debug else _in_words(error)
        if text is None:
            raise
        errors = Console(stderr=True, soft_wrap=True)
        errors.print("error:", style="bold red", end=" ")
        errors.print(text, markup=False, highlight=False)
        sys.exit(2)


def _in_words(error: Exception) -> str | None:
    """The error for whoever typed the command; None if it is a fault of ours."""
    if isinstance(error, SurgicalError | OSError):  # a folder that cannot be written to, say
        return str(error)
    remedy = machine_fault(error)
    return remedy and f"{type(error).__name__}: {reason_of(error)}: {remedy}."
