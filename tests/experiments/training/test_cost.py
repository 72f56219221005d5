"""Estimates: by the depth of what is tuned, by as many processes as share the work, in time and memory."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from surgical_peft.experiments.tasks.evaluation import Measure
from surgical_peft.experiments.training import cost
from surgical_peft.experiments.training.cost import (
    Timing,
    depth_of,
    measuring_seconds,
    memory_in_words,
    shared,
    timed_at_once,
)
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


class Writer(nn.Linear):
    """A model whose passes take so many seconds of a played clock: that of the prompts, and each after it."""

    def __init__(self, clock: list[float], prompts: float, token: float) -> None:
        super().__init__(1, 1)
        self.clock, self.prompts, self.token, self.passes = clock, prompts, token, 0

    def forward(self, *_: Any) -> None:
        self.clock[0] += self.token if self.passes else self.prompts
        self.passes += 1


def written(model: Any, batch: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    model.passes = 0
    for _ in range(100):
        model(batch)
    return [0], [0]


@pytest.mark.parametrize(
    ("prompts", "token", "passes"),
    [
        (0.5, 0.01, 100),  # all of it
        (2.0, 0.3, 5),
        (60.0, 5.0, 4),  # however long it takes: of one pass nothing follows
    ],
)
def test_answers_that_take_long_are_not_written_to_their_end(
    prompts: float, token: float, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    model = Writer(clock, prompts, token)
    measure = Measure(lambda *_: 0.0, written, batch_size=2, tokens=100)
    examples: Any = [{"a": 1}] * 6
    told = measuring_seconds(measure, model, examples)
    assert told == pytest.approx(3 * (prompts + 99 * token), rel=0.01)
    assert model.passes == passes and not model._forward_hooks


def test_too_much_memory_is_said() -> None:
    assert "1.2 GB, 0.6 GB for each" in memory_in_words(600_000_000, 2) and "too much" in memory_in_words(10**15, 1)
    assert "too much" not in memory_in_words(1_000_000, 1)
