"""What processes that train side by side share: the threads of the machine, and silence."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import torch
from transformers.utils import logging


@contextmanager
def shared_threads(jobs: int) -> Iterator[None]:
    """Each of several processes gets its share of the threads inside, one alone keeps what it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quieten() -> None:
    """No progress bars and no notes of libraries; what is imported so far is not looked through for garbage."""
    gc.freeze()  # Trainer collects garbage after every training, for a quarter of a second over what was imported
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
