"""Keeps the suite offline, quiet and on two threads, before transformers is imported."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging

from .toys import TOYS, Toy

torch.set_num_threads(2)
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(params=list(TOYS))
def toy(request: pytest.FixtureRequest) -> Toy:
    """Every toy in turn."""
    return TOYS[request.param]


@pytest.fixture
def vit() -> Toy:
    return TOYS["vit"]
