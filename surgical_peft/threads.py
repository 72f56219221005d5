"""Threads that are not waited for when they start."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Any

from .errors import SurgicalError, machine_fault


def in_background(function: Callable[..., None], *arguments: Any) -> threading.Event:
    """Call a function in a thread that does not keep the process alive; the event that it gives is set at its end.

    `Thread.start` waits until the thread runs: for ever, if there is no memory to begin it with.

    Raises:
        SurgicalError: there is no room for another thread.
    """
    over = threading.Event()

    def run() -> None:
        try:
            function(*arguments)
        finally:
            over.set()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError as error:
        raise SurgicalError(
            f"a thread is needed ({error}): {machine_fault(error) or 'see what ends this process'}; then run the same "
            "again."
        ) from error
    return over
