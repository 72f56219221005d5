"""The threads of the machine, shared among processes that train side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def shared_threads(jobs: int) -> Iterator[None]:
    """Each of several processes gets its share of the threads inside, one alone keeps what it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)
