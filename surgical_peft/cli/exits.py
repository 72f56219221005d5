"""The ways in which a command ends early: with one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from ..errors import SurgicalError, machine_fault, reason_of

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
    try:
        yield
    except KeyboardInterrupt as stop:
        kept = str(stop) or _KEPT.get(context and context.invoked_subcommand, "Nothing is kept.")
        errors = Console(stderr=True, soft_wrap=True)
        errors.print(f"interrupted. {kept}", markup=False, highlight=False)
        raise typer.Exit(130) from None


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
