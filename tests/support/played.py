"""Plays a search procedure against a table of metrics, as a search would, and checks what it proposes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from surgical_peft import BlockMap

Candidate = tuple[str, ...]
Metric = Callable[[Candidate], float]
LAYERS = tuple(map(str, range(12)))
BLOCKS = BlockMap(
    names=("embeddings", *LAYERS, "final_norm", "head"), modules={}, stacks={"": LAYERS}, tied={}, model_name="Toy"
)


@dataclass(frozen=True)
class Played:
    """What was proposed, round by round, what it was told, and what it chose in the end."""

    rounds: list[list[Candidate]]
    metrics: list[float]
    chosen: Candidate | None

    @property
    def trials(self) -> list[Candidate]:
        return [candidate for each in self.rounds for candidate in each]

    @property
    def winner(self) -> Candidate | None:
        """What was chosen, or else the best trial: of equals the first, never one that failed."""
        if self.chosen is not None:
            return self.chosen
        best: Candidate | None = None
        reached = -math.inf
        for candidate, metric in zip(self.trials, self.metrics, strict=True):
            if metric > reached:
                best, reached = candidate, metric
        return best


def toy_map(layers: int) -> BlockMap:
    """The map of a ViT with so many layers."""
    names = tuple(map(str, range(layers)))
    return BlockMap(("embeddings", *names, "final_norm", "head"), {}, {"": names}, {}, "Toy")


def play(procedure: Callable[[BlockMap], Any], blocks: BlockMap, metric: Metric, limit: int = 1000) -> Played:
    """Drive the generator to its end; everything that it proposes must be a trial that can be run."""
    proposals = procedure(blocks)
    rounds: list[list[Candidate]] = []
    metrics: list[float] = []
    told: Any = None
    while True:
        try:
            asked = proposals.send(told)
        except StopIteration as end:
            return Played(rounds, metrics, end.value)
        single = all(isinstance(name, str) for name in asked)
        each = [asked] if single else list(asked)
        check(each, blocks)
        rounds.append(each)
        metrics += [metric(candidate) for candidate in each]
        assert len(metrics) <= limit, f"no end after {limit} trials"
        told = metrics[-1] if single else metrics[-len(each) :]


def check(proposed: Sequence[Candidate], blocks: BlockMap) -> None:
    assert proposed, "an empty round"
    for candidate in proposed:
        assert isinstance(candidate, tuple) and candidate, f"{candidate!r} is not a tuple with a block in it"
        assert set(candidate) <= set(blocks.names), f"{candidate} names unknown blocks"
        ordered = tuple(name for name in blocks.names if name in candidate)
        assert candidate == ordered, f"{candidate} is not in the map's order, or names a block twice"
