"""Silence of other libraries, on the command line and in worker processes."""

from __future__ import annotations

import gc
import warnings

from transformers.utils import logging
from transformers.utils.import_utils import is_datasets_available


def quieten() -> None:
    """No progress bars and no notes of libraries; what is imported so far is not looked through for garbage."""
    gc.freeze()  # Trainer collects garbage after every training, for a quarter of a second over what was imported
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if is_datasets_available():
        import datasets

        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.formatwarning = _as_line  # type: ignore[assignment]


def _as_line(message: Warning | str, *_: object) -> str:
    return f"warning: {message}\n"
