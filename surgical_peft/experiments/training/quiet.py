"""Silence in processes that work for another one."""

from __future__ import annotations

import gc
import warnings

import datasets
from transformers.utils import logging


def quieten() -> None:
    """No progress bars and no notes of libraries; what is imported so far is not looked through for garbage."""
    gc.freeze()  # Trainer collects garbage after every training, for a quarter of a second over what was imported
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
