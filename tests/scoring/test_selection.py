"""Rules: each against results worked out by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable

import pytest

from surgical_peft import (
    BlockScores,
    Selection,
    SurgicalConfig,
    SurgicalError,
    above,
    score_blocks,
    top_fraction,
    top_k,
    within_budget,
)
from tests.support.toys import Toy

#         scores            parameters
BLOCKS = {
    "embeddings": (0.30, 100),
    "0": (0.10, 40),
    "1": (0.50, 60),
    "2": (0.10, 40),
    "final_norm": (0.05, 4),
    "head": (0.90, 30),
}


def scores_of(values: dict[str, float], sizes: dict[str, int], granularity: str = "block") -> BlockScores:
    return BlockScores(values, sizes, {name: name for name in values}, (), "rgn", granularity, 5, "ToyModel")


SCORES = scores_of({name: score for name, (score, _) in BLOCKS.items()}, {name: n for name, (_, n) in BLOCKS.items()})
EQUAL = scores_of({str(index): 0.5 for index in range(12)}, {str(index): 10 for index in range(12)})


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, ("head",)),
        (2, ("1", "head")),
        (3, ("embeddings", "1", "head")),
        (4, ("embeddings", "0", "1", "head")),  # 0 and 2 are equal: the earlier one
        (6, tuple(BLOCKS)),
    ],
)
def test_top_k(k: int, expected: tuple[str, ...]) -> None:
    assert top_k(SCORES, k).blocks == expected


def test_top_k_warns_of_scores_below_zero() -> None:
    scores = scores_of({"0": -0.1, "1": 0.2, "head": -0.3}, {"0": 1, "1": 1, "head": 1})
    with pytest.warns(UserWarning, match="block 0 with"):
        assert top_k(scores, 2).blocks == ("0", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        top_k(scores, 1)


@pytest.mark.parametrize("k", [0, -1, 7, True, 2.0, "2", None])
def test_top_k_refuses(k: object) -> None:
    with pytest.raises(SurgicalError, match=f"k={k!r}.*1 to 6"):
        top_k(SCORES, k)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.01, ("head",)),  # at least one
        (0.2, ("head",)),  # 1.2
        (1 / 3, ("1", "head")),
        (0.6, ("embeddings", "0", "1", "head")),  # 3.6
        (1, tuple(BLOCKS)),
        (1.0, tuple(BLOCKS)),
    ],
)
def test_top_fraction(fraction: float, expected: tuple[str, ...]) -> None:
    assert top_fraction(SCORES, fraction).blocks == expected


@pytest.mark.parametrize("fraction", [0, 0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_top_fraction_refuses(fraction: float) -> None:
    with pytest.raises(SurgicalError, match=f"fraction={fraction}"):
        top_fraction(SCORES, fraction)


@pytest.mark.parametrize(
    ("threshold", "normalized", "expected"),
    [
        (0.3, None, ("1", "head")),  # more than, not equal
        (0.29, None, ("embeddings", "1", "head")),
        (-1, None, tuple(BLOCKS)),
        (0.5, "max", ("1", "head")),  # 0.5 / 0.9
        (0.34, "max", ("1", "head")),  # 0.3 / 0.9 = 0.333
        (0.33, "max", ("embeddings", "1", "head")),
        (0.0, "minmax", ("embeddings", "0", "1", "2", "head")),  # the smallest is 0
        (0.06, "minmax", ("embeddings", "1", "head")),  # 0.05 / 0.85 = 0.059
    ],
)
def test_above(threshold: float, normalized: str | None, expected: tuple[str, ...]) -> None:
    assert above(SCORES, threshold, normalized).blocks == expected


@pytest.mark.parametrize(
    ("threshold", "normalized", "why"),
    [
        (0.9, None, "0.9"),
        (1.0, "max", "highest is 1"),
        (float("nan"), None, "nan"),
        (0.5, "mean", "normalize='mean' is unknown"),
    ],
)
def test_above_refuses(threshold: float, normalized: str | None, why: str) -> None:
    with pytest.raises(SurgicalError, match=why):
        above(SCORES, threshold, normalized)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (4, ("final_norm",)),
        (30, ("head",)),
        (34, ("final_norm", "head")),
        (73, ("0", "head")),  # 1 and embeddings do not fit, 0 does, then nothing more: 70 of 73
        (74, ("0", "final_norm", "head")),
        (90, ("1", "head")),
        (190, ("embeddings", "1", "head")),
        (10_000, tuple(BLOCKS)),
    ],
)
def test_within_budget(budget: int, expected: tuple[str, ...]) -> None:
    assert within_budget(SCORES, budget).blocks == expected


@pytest.mark.parametrize("budget", [3, 0, -1])
def test_within_budget_refuses(budget: int) -> None:
    with pytest.raises(SurgicalError, match=f"max_parameters={budget}.*'final_norm', 4"):
        within_budget(SCORES, budget)


def test_of_equal_blocks_the_earlier_wins() -> None:
    assert top_k(EQUAL, 3).blocks == ("0", "1", "2")
    assert top_fraction(EQUAL, 0.25).blocks == ("0", "1", "2")
    assert within_budget(EQUAL, 35).blocks == ("0", "1", "2")


def test_of_equal_blocks_the_earlier_in_the_model_wins_not_in_the_alphabet() -> None:
    scores = scores_of({"9": 1.0, "10": 1.0, "head": 1.0}, {"9": 1, "10": 1, "head": 1})
    assert top_k(scores, 2).blocks == ("9", "10")


RULES: dict[str, Callable[[BlockScores], Selection]] = {
    "top_k": lambda scores: top_k(scores, 2),
    "top_fraction": lambda scores: top_fraction(scores, 0.5),
    "above": lambda scores: above(scores, 0.01, "max"),
    "within_budget": lambda scores: within_budget(scores, 100),
}


@pytest.mark.parametrize("rule", RULES)
def test_scores_of_anything_but_blocks_are_refused(rule: str) -> None:
    scores = scores_of(SCORES.values, SCORES.sizes, granularity="tensor")
    with pytest.raises(SurgicalError, match=r"scores of tensors.*granularity='block'"):
        RULES[rule](scores)


@pytest.mark.parametrize("rule", RULES)
def test_the_record_tells_how_and_goes_through_json_and_the_config(rule: str) -> None:
    selection = RULES[rule](SCORES)
    record = selection.record
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["rule"] == rule and record["scores"] == SCORES.values
    assert (record["criterion"], record["num_batches"]) == ("rgn", 5)
    config = SurgicalConfig.from_selection(selection)
    assert tuple(config.blocks) == selection.blocks and config.selection == record


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_leaves_the_scores_alone(rule: str) -> None:
    before = SCORES.to_json()
    RULES[rule](SCORES).record["scores"]["0"] = 99.0
    assert SCORES.to_json() == before


def test_selections_are_equal_and_hashed_by_their_blocks() -> None:
    first, second = top_k(SCORES, 2), above(SCORES, 0.3)
    assert first == second and len({first, second}) == 1 and first.record != second.record


def test_a_selection_of_a_real_model_wraps_it(toy: Toy) -> None:
    scores = score_blocks(toy.model(), [toy.batch()])
    layers = {name: value for name, value in scores.values.items() if name.rpartition(".")[2].isdigit()}
    scores = scores_of(layers, {name: scores.sizes[name] for name in layers})
    import peft

    model = peft.get_peft_model(toy.model(), SurgicalConfig.from_selection(top_k(scores, 2)))
    best = sorted(layers, key=lambda name: layers[name])[-2:]
    assert set(model.peft_config["default"].blocks) == set(best)
