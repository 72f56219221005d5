"""Keeps the suite offline, quiet and on one thread (the toys are too small for more), before torch is imported."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # for subprocesses too

import pytest
import torch
from transformers.utils import logging

from tests.support.toys import TOYS, Toy

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(params=list(TOYS))
def toy(request: pytest.FixtureRequest) -> Toy:
    """Every toy in turn."""
    return TOYS[request.param]


@pytest.fixture
def vit() -> Toy:
    return TOYS["vit"]
