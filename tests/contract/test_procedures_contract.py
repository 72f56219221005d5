"""What every search procedure must do, ours and an outsider's; a new file in `procedures/` is picked up by itself."""

from __future__ import annotations

import inspect
import math
import pickle
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from surgical_peft import BlockMap, procedures
from surgical_peft.procedures import Procedure, as_procedure
from surgical_peft.procedures.procedure import procedure
from tests.support.families import FAMILIES
from tests.support.played import Candidate, Metric, Played, play
from tests.support.toys import TOYS

SHARED = {"procedure"}  # files of `procedures/` that are no procedure


def one_by_one(blocks: BlockMap) -> Any:
    """A user's own: single candidates, each with one metric; chooses as soon as one is good enough."""
    for name in blocks.names:
        metric = yield (name,)
        if metric > 0.9:
            return (name,)


def pairs_then_triple(blocks: BlockMap, first: int = 1) -> Any:
    """A user's own: a round, then a single candidate that depends on it, then another round."""
    names = blocks.names[first:]
    pairs = [names[:2], names[1:3], (names[0], names[2])]
    metrics = yield pairs
    told = [(metric, pair) for metric, pair in zip(metrics, pairs, strict=True) if not math.isnan(metric)]
    if told:
        yield names[:3]
        yield [(max(told)[1][0],), (max(told)[1][1],)]


@procedure()
def first_few(blocks: BlockMap, count: int = 2) -> Any:
    """A user's own that takes its settings first, as ours do."""
    yield [(name,) for name in blocks.names[:count]]


def scored(blocks: BlockMap) -> dict[str, float]:
    return {name: (5 * number) % 7 / 7 for number, name in enumerate(blocks.names)}


# What a procedure cannot be called without.
SETTINGS: dict[str, dict[str, Any]] = {
    "top_k_jointly": {"num_blocks": 3},
    "segments": {"parts": 2},
    "windows": {"width": 2},
    "random_subsets": {"num_blocks": 2, "num_trials": 3, "seed": 5},
}
Maker = Callable[[BlockMap], Procedure]
MORE: dict[str, Maker] = {
    "by_score_then_greedy": lambda blocks: procedures.by_score_then_greedy(scored(blocks), 3),
    "sweep-all": lambda blocks: procedures.sweep("all"),
    "segments-cuts": lambda blocks: procedures.segments(cuts=[blocks.names[2]], candidates="all"),
    "windows-stride": lambda blocks: procedures.windows(3, stride=2, candidates="all"),
    "cross_val-2": lambda blocks: procedures.cross_val(2),
    "contiguous-all": lambda blocks: procedures.contiguous("all"),
    "greedy_forward-2": lambda blocks: procedures.greedy_forward(2, epsilon=0, candidates="all"),
    "greedy_backward-loss": lambda blocks: procedures.greedy_backward(epsilon=-0.3),
    "outsider one by one": lambda blocks: as_procedure(one_by_one),
    "outsider rounds": lambda blocks: as_procedure(pairs_then_triple),
    "outsider with settings": lambda blocks: first_few(count=3),
    "outsider partial": lambda blocks: as_procedure(partial(pairs_then_triple, first=0)),
}


def maker(name: str) -> Maker:
    return lambda blocks: getattr(procedures, name)(**SETTINGS.get(name, {}))


MAKERS = {**{name: maker(name) for name in procedures.__all__}, **MORE}
MODELS = {"one stack": TOYS["vit"], "two stacks": TOYS["t5"], "stages": FAMILIES["swin"], "no head": TOYS["gpt2"]}


@cache
def block_map(model: str) -> BlockMap:
    return BlockMap.find(MODELS[model].model())


# The others are those of the package in other settings, or know of a map no more than its names.
CASES = [(name, model) for name in MAKERS for model in (MODELS if name in procedures.__all__ else ["two stacks"])]


@pytest.fixture(params=CASES, ids=map(" on ".join, CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def make(case: tuple[str, str]) -> Maker:
    return MAKERS[case[0]]


@pytest.fixture
def blocks(case: tuple[str, str]) -> BlockMap:
    return block_map(case[1])


def table(seed: int) -> Metric:
    """A metric for every candidate, by chance, the same at every call."""
    return lambda candidate: random.Random(f"{seed} {candidate}").random()


def failing(metric: Metric, *failed: Candidate) -> Metric:
    return lambda candidate: math.nan if candidate in failed else metric(candidate)


def most(blocks: BlockMap) -> int:
    """The stated limit: no more trainings than the spans of all blocks and two references."""
    return len(blocks.names) * (len(blocks.names) + 1) // 2 + 2


def sound(played: Played) -> None:
    """No trial twice, and what is chosen was tried and did not fail."""
    assert len(set(played.trials)) == len(played.trials)
    metrics = dict(zip(played.trials, played.metrics, strict=True))
    assert played.chosen is None or not math.isnan(metrics[played.chosen])
    assert (played.winner is None) == all(math.isnan(metric) for metric in played.metrics)


def test_the_maps_are_what_they_are_called() -> None:
    assert [len(block_map(name).stacks) for name in MODELS] == [1, 2, 2, 1]
    assert any("stages" in name for name in block_map("stages").names)
    assert not any("head" in name for name in block_map("no head").names)


def test_every_file_is_a_procedure_and_every_procedure_has_a_file() -> None:
    files = {path.stem for path in Path(inspect.getfile(procedures)).parent.glob("*.py")} - {"__init__"} - SHARED
    assert files == set(procedures.__all__)
    assert files <= set(MAKERS)


@pytest.mark.parametrize("name", procedures.__all__)
def test_it_documents_what_one_has_to_know(name: str) -> None:
    text = inspect.getdoc(getattr(procedures, name)) or ""
    for word in ("Trainings: ", "Source: ", "Example:\n    >>> "):
        assert word in text, word


def test_its_text_says_its_settings_and_no_address(make: Maker, blocks: BlockMap) -> None:
    made = make(blocks)
    assert isinstance(made, Procedure) and made == make(blocks)
    assert str(made).startswith(made.name + "(") and " at 0x" not in str(made)
    assert all(str(value) in str(made) for value in made.settings.values() if value is not None)


METRICS: dict[str, Metric] = {
    **{f"by chance {seed}": table(seed) for seed in range(3)},
    **{f"all {reached}": lambda candidate, r=reached: r for reached in (0.0, -1e9, 1e9)},
    "more is better": lambda candidate: float(len(candidate)),
    "more is worse": lambda candidate: -float(len(candidate)),
}


def test_it_ends_and_proposes_what_can_be_trained(make: Maker, blocks: BlockMap) -> None:
    for metric in METRICS.values():
        played = play(make(blocks), blocks, metric, limit=most(blocks))
        assert played.trials
        sound(played)


def test_the_same_metrics_lead_to_the_same_proposals(make: Maker, blocks: BlockMap) -> None:
    """Also after pickling, whatever the global generators, and with two generators taking turns."""
    random.seed(1)
    first = play(make(blocks), blocks, table(0))
    state = random.getstate()
    made = make(blocks)
    other = made(blocks)
    next(other)
    random.seed(2)
    assert play(made, blocks, table(0)) == first
    assert play(pickle.loads(pickle.dumps(made)), blocks, table(0)) == first
    random.setstate(state)
    play(made, blocks, table(1))
    assert random.getstate() == state
    other.close()


def test_one_failed_trial_is_survived_wherever_it_is(make: Maker, blocks: BlockMap) -> None:
    metric = table(3)
    before = play(make(blocks), blocks, metric)
    for number, failed in enumerate(before.trials):
        played = play(make(blocks), blocks, failing(metric, failed), limit=most(blocks))
        assert played.trials[: number + 1] == before.trials[: number + 1]
        assert failed != played.winner
        sound(played)


def test_failures_of_most_or_all_are_survived(make: Maker, blocks: BlockMap) -> None:
    nothing = play(make(blocks), blocks, lambda candidate: math.nan, limit=most(blocks))
    assert nothing.trials and nothing.winner is None and nothing.chosen is None
    for seed in range(5):
        chance = random.Random(seed)
        fails = {candidate: chance.random() < 0.7 for candidate in nothing.trials}
        metric = table(seed)
        sound(play(make(blocks), blocks, lambda c, f=fails, m=metric: math.nan if f.get(c, False) else m(c)))
