"""Estimates: by the depth of what is tuned, by as many processes as share the work, in time and memory."""

from __future__ import annotations

import os
import time

import pytest

from surgical_peft.experiments.training.cost import Timing, depth_of, memory_in_words, shared, timed_at_once
from tests.support.cli import QUIET

NAMES = ["embeddings", "0", "1", "2", "final_norm", "head"]
LAYERS = NAMES[1:4]


@pytest.mark.parametrize(
    ("blocks", "depth"),
    [
        (["0"], 0.0),
        (["1"], 0.5),
        (["2"], 1.0),
        (["head"], 1.0),
        (["embeddings"], 0.0),
        (["1", "head"], 0.5),
        ([], 0.0),
    ],
)
def test_a_training_costs_by_the_depth_of_its_first_block(blocks: list[str], depth: float) -> None:
    timing = Timing(whole=10.0, last=4.0, step=0.1, measure=1.0, start=2.0, memory=1)
    assert depth_of(blocks, NAMES, LAYERS) == depth
    assert timing.seconds(depth) == pytest.approx(10 - 6 * depth)


def test_processes_share_but_none_is_shorter_than_the_longest_training() -> None:
    cores = os.cpu_count() or 1
    assert shared(100.0, cores, longest=1.0) == pytest.approx(100.0 / cores)
    assert shared(100.0, 10_000, longest=90.0) == pytest.approx(max(100.0 / cores, 90.0))


def one(begun: float) -> Timing:
    time.sleep(0.1)
    return Timing(whole=time.time() - begun, last=1.0, step=0.1, measure=0.2, start=0.3, memory=os.getpid())


def test_it_is_timed_in_as_many_processes_as_will_share_the_work() -> None:
    """The time of one alone was told, divided by the processes, which hold each other up and have to start."""
    alone, both = (timed_at_once(jobs, QUIET, one, time.time()) for jobs in (1, 2))
    assert alone.memory == os.getpid() and both.memory != os.getpid()
    assert alone.start < 1.0 < both.start  # a process imports torch first
    assert (both.last, both.step, both.measure) == (1.0, 0.1, 0.2)


def test_too_much_memory_is_said() -> None:
    assert "1.2 GB, 0.6 GB for each" in memory_in_words(600_000_000, 2) and "too much" in memory_in_words(10**15, 1)
    assert "too much" not in memory_in_words(1_000_000, 1)
