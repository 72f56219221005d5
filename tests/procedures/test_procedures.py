"""Each search procedure against a hand-made table of metrics: what it proposes, how often, and what it chooses."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from surgical_peft import BlockMap, BlockScores, SurgicalError, procedures
from surgical_peft.procedures import Procedure, as_procedure
from tests.support.played import Candidate, Metric, Played, play, toy_map

NAN = math.nan
FOUR, TWELVE = toy_map(4), toy_map(12)
LAYERS = FOUR.stacks[""]
ENCODER, DECODER = ("encoder.0", "encoder.1"), ("decoder.0", "decoder.1")
TWO_STACKS = BlockMap(
    ("embeddings", *ENCODER, "encoder.final_norm", *DECODER, "decoder.final_norm"),
    {},
    {"encoder": ENCODER, "decoder": DECODER},
    {},
    "T5",
)
STAGES = BlockMap(
    ("embeddings", "stages.0.0", "stages.0.1", "stages.1.embeddings", "stages.1.0", "final_norm", "head"),
    {},
    {"stages.0": ("stages.0.0", "stages.0.1"), "stages.1": ("stages.1.0",)},
    {},
    "Swin",
)
BARE = BlockMap(("0", "1", "2"), {}, {"": ("0", "1", "2")}, {}, "Bare")


def sets(text: str) -> list[Candidate]:
    """`"0 1,12"` for two single layers and one pair; `e`, `n` and `h` are embeddings, final norm and head."""
    words = {"e": "embeddings", "n": "final_norm", "h": "head"}
    return [tuple(words.get(letter, letter) for letter in each) for each in text.split()]


def by(table: dict[str, float], otherwise: float = 0.0) -> Metric:
    """The metrics of a table, by candidates as `sets` writes them."""
    known = {sets(text)[0]: metric for text, metric in table.items()}
    return lambda candidate: known.get(candidate, otherwise)


def alike(candidate: Candidate) -> float:
    return 0.5


def larger(candidate: Candidate) -> float:
    return float(len(candidate))


def smaller(candidate: Candidate) -> float:
    return -float(len(candidate))


@pytest.mark.parametrize(
    ("procedure", "proposed"),
    [
        (procedures.sweep(), "0 1 2 3 e0123nh h"),
        (procedures.sweep("all"), "e 0 1 2 3 n h e0123nh"),
        (procedures.sweep([0, "head"]), "0 h e0123nh"),
        (procedures.segments(2), "23 01"),
        (procedures.segments(3), "23 1 0"),
        (procedures.segments(4), "3 2 1 0"),
        (procedures.segments(1), "0123"),
        (procedures.segments(cuts=[1]), "123 0"),
        (procedures.segments(cuts=[-1, 1]), "3 12 0"),
        (procedures.segments(cuts=[0, 2]), "23 01"),
        (procedures.segments(cuts="1:3"), "23 1 0"),
        (procedures.segments(cuts=["head", 0], candidates="all"), "h 0123n e"),
        (procedures.windows(1), "3 2 1 0"),
        (procedures.windows(3), "123 012"),
        (procedures.windows(4), "0123"),
        (procedures.windows(2, stride=2), "23 01"),
        (procedures.windows(1, stride=2), "3 1"),
        (procedures.windows(3, stride=9), "123"),
        (procedures.windows(3, candidates=["embeddings", "0:2"]), "e01"),
        (procedures.prefix(), "nh 3nh 23nh 123nh e0123nh"),
        (procedures.suffix(), "e e0 e01 e012 e0123nh"),
        (procedures.cross_val(), "e0 1 23 nh e0123nh"),
        (procedures.cross_val(1), "e0123 nh e0123nh"),
        (procedures.cross_val(4), "e0 1 2 3 nh e0123nh"),
        (procedures.contiguous(), "0 1 2 3 01 12 23 012 123 0123"),
        (procedures.contiguous("-2:"), "2 3 23"),
    ],
    ids=str,
)
def test_what_is_proposed_at_once(procedure: Procedure, proposed: str) -> None:
    """In one round, whatever the metrics; the choice is that of the best trial, of equals the first."""
    played = play(procedure, FOUR, alike)
    assert played.rounds == [sets(proposed)] and played.chosen is None
    assert played.winner == sets(proposed)[0]
    assert (
        play(procedure, FOUR, smaller).rounds
        == play(procedure, FOUR, lambda candidate: NAN).rounds
        == [sets(proposed)]
    )


def test_of_equals_the_first_wins_and_a_failure_never() -> None:
    played = play(procedures.sweep(), FOUR, by({"0": NAN, "1": 0.7, "3": 0.7, "h": 0.6}))
    assert played.winner == ("1",)
    assert play(procedures.windows(2), FOUR, by({"01": 0.9, "12": 0.9, "23": NAN})).winner == ("1", "2")


@pytest.mark.parametrize(
    ("procedure", "trainings"),
    [
        (procedures.sweep(), 14),
        (procedures.cross_val(), 5),
        (procedures.cross_val(4), 6),
        (procedures.prefix(), 13),
        (procedures.suffix(), 13),
        (procedures.top_k_jointly(2), 13),
        (procedures.top_k_jointly(12), 12 + 11),
        (procedures.segments(4), 4),
        (procedures.segments(cuts=[3, 6, 9]), 4),
        (procedures.windows(3), 10),
        (procedures.windows(3, stride=2), (12 - 3) // 2 + 1),
        (procedures.greedy_forward(3), 12 + 11 + 10),
        (procedures.greedy_forward(12), 78),
        (procedures.greedy_forward(), 78),
        (procedures.greedy_backward(), 12 + 1),
        (procedures.greedy_backward(epsilon=-1), 1 + 12 + 11),
        (procedures.greedy_backward(epsilon=-11), 78),
        (procedures.contiguous(), 78),
        (procedures.random_subsets(2, num_trials=7), 7),
        (procedures.random_subsets(2, num_trials=66), 66),
        (procedures.by_score_then_greedy(dict.fromkeys(TWELVE.names, 1.0), 4), 4 + 3 + 2 + 1),
    ],
    ids=str,
)
def test_number_of_trainings_for_twelve_layers(procedure: Procedure, trainings: int) -> None:
    """With L = 12: as many as the methods' papers need, when more blocks are always better."""
    played = play(procedure, TWELVE, larger)
    assert len(played.trials) == len(set(played.trials)) == trainings


def test_greedy_forward_to_three_blocks_and_a_round_that_fails_to_gain() -> None:
    """42 trainings: 12 + 11 + 10, and 9 to see that a fourth block gains nothing."""
    played = play(procedures.greedy_forward(), TWELVE, lambda candidate: min(len(candidate), 3) / 3)
    assert len(played.trials) == 42 and played.chosen == ("0", "1", "2")


def test_what_several_stacks_propose() -> None:
    every = TWO_STACKS.names
    assert play(procedures.sweep(), TWO_STACKS, alike).trials == [*((name,) for name in ENCODER + DECODER), every]
    assert play(procedures.prefix(), TWO_STACKS, alike).trials == [every[n:] for n in (6, 5, 3, 2, 0)]
    assert play(procedures.suffix(), TWO_STACKS, alike).trials == [every[:n] for n in (1, 2, 4, 5, 7)]
    assert play(procedures.cross_val(), TWO_STACKS, alike).trials == [every[:4], every[4:6], every[6:], every]
    assert play(procedures.cross_val(4), TWO_STACKS, alike).trials[1] == ("encoder.1", "encoder.final_norm")
    assert play(procedures.segments(cuts=["decoder[0]"]), TWO_STACKS, alike).trials == [DECODER, ENCODER]
    assert len(play(procedures.contiguous(), TWO_STACKS, alike).trials) == 10


def test_what_stages_propose() -> None:
    """What leads into a stage is tuned with that stage, and frozen with the layer before it thaws."""
    every = STAGES.names
    assert play(procedures.cross_val(), STAGES, alike).trials == [every[:3], every[3:5], every[5:], every]
    assert play(procedures.prefix(), STAGES, alike).trials == [every[n:] for n in (5, 3, 2, 0)]
    assert play(procedures.suffix(), STAGES, alike).trials == [every[:n] for n in (1, 2, 4, 7)]


def test_a_model_of_nothing_but_layers() -> None:
    names = BARE.names
    assert play(procedures.sweep(), BARE, alike).trials == [("0",), ("1",), ("2",), names]
    assert play(procedures.prefix(), BARE, alike).trials == [names[2:], names[1:], names]
    assert play(procedures.suffix(), BARE, alike).trials == [names[:1], names[:2], names]
    assert play(procedures.cross_val(), BARE, alike).trials == [("0",), ("1",), ("2",), names]
    assert play(procedures.cross_val(1), BARE, alike).trials == [names]


@pytest.mark.parametrize(
    ("num_blocks", "table", "together"),
    [
        (3, {"0": 0.1, "1": 0.4, "2": 0.2, "3": 0.3}, "13 123"),
        (4, {"0": 0.1, "1": 0.4, "2": 0.2, "3": 0.3}, "13 123 0123"),
        (3, {}, "01 012"),  # ties: the earlier ranks higher
        (2, {"0": 0.3, "2": 0.3, "3": 0.3}, "02"),
        (4, {"0": NAN, "1": 0.1, "2": 0.9, "3": NAN}, "12"),  # a failed block is never taken
        (2, {"0": NAN, "1": -0.1, "2": NAN, "3": NAN}, ""),
        (1, {"0": 0.1}, ""),
    ],
)
def test_top_k_jointly(num_blocks: int, table: dict[str, float], together: str) -> None:
    played = play(procedures.top_k_jointly(num_blocks), FOUR, by(table))
    assert played.rounds == [sets("0 1 2 3"), *([sets(together)] if together else [])]
    assert played.chosen is None


PAIRS_PAY = {"1": 0.5, "2": 0.5, "01": 0.55, "12": 0.6, "13": 0.58, "012": 0.6, "123": 0.609, "0123": 0.7}


@pytest.mark.parametrize(
    ("settings", "table", "rounds", "chosen"),
    [
        ({"num_blocks": 1}, PAIRS_PAY, ["0 1 2 3"], "1"),  # of equals the lower index
        ({"num_blocks": 2}, PAIRS_PAY, ["0 1 2 3", "01 12 13"], "12"),
        ({"num_blocks": 3}, PAIRS_PAY, ["0 1 2 3", "01 12 13", "012 123"], "12"),  # 0.009 < 0.01
        ({}, PAIRS_PAY, ["0 1 2 3", "01 12 13", "012 123"], "12"),
        ({"epsilon": 0.009}, PAIRS_PAY, ["0 1 2 3", "01 12 13", "012 123", "0123"], "0123"),
        ({"epsilon": 0.11}, PAIRS_PAY, ["0 1 2 3", "01 12 13"], "1"),
        ({"epsilon": 0.1}, PAIRS_PAY, ["0 1 2 3", "01 12 13", "012 123"], "12"),  # a gain of just epsilon is one
        ({"epsilon": 0}, {"01": -0.1, "02": -0.1, "03": -0.1}, ["0 1 2 3", "01 02 03"], "0"),
        ({"epsilon": 0, "num_blocks": 2}, {}, ["0 1 2 3", "01 02 03"], "01"),
        ({}, {"0": 0.81, "02": 0.82}, ["0 1 2 3", "01 02 03", "012 023"], "02"),  # 0.82 - 0.81 < 0.01 in floats
        ({}, {"0": 0.81, "02": 0.8199}, ["0 1 2 3", "01 02 03"], "0"),
        ({}, {"0": NAN, "1": NAN, "2": -5.0, "3": -6.0, "12": NAN, "02": NAN, "23": NAN},
         ["0 1 2 3", "02 12 23"], "2"),
        ({"candidates": ["embeddings", 3]}, {"e": 0.1, "3": 0.2, "e3": 0.3}, ["e 3", "e3"], "e3"),
    ],
)  # fmt: skip
def test_greedy_forward(settings: dict[str, Any], table: dict[str, float], rounds: list[str], chosen: str) -> None:
    played = play(procedures.greedy_forward(**settings), FOUR, by(table))
    assert played.rounds == [sets(each) for each in rounds]
    assert played.winner == played.chosen == sets(chosen)[0]


@pytest.mark.parametrize(
    ("settings", "table", "rounds", "chosen"),
    [
        ({}, {"0123": 0.5, "123": 0.4, "023": 0.4}, ["0123", "123 023 013 012"], "0123"),
        ({}, {"0123": 0.5, "023": 0.6, "013": 0.6, "23": 0.6},
         ["0123", "123 023 013 012", "23 03 02", "3 2"], "23"),  # the lower index goes first; what is not missed goes
        ({"epsilon": 0.1}, {"0123": 0.5, "023": 0.6, "23": 0.6}, ["0123", "123 023 013 012", "23 03 02"], "023"),
        ({"epsilon": 0.11}, {"0123": 0.5, "023": 0.6}, ["0123", "123 023 013 012"], "0123"),
        ({"epsilon": -0.05}, {"0123": 0.5, "023": 0.47, "23": 0.44}, ["0123", "123 023 013 012", "23 03 02"], "023"),
        ({"epsilon": -0.06}, {"0123": 0.5, "023": 0.47, "23": 0.44},
         ["0123", "123 023 013 012", "23 03 02", "3 2"], "23"),
        ({"epsilon": -9}, {}, ["0123", "123 023 013 012", "23 13 12", "3 2"], "3"),
        ({}, {"0123": NAN, "123": -3.0, "023": -2.0, "013": NAN, "012": -9.0, "23": -3.0, "03": -3.0, "02": -3.0},
         ["0123", "123 023 013 012", "23 03 02"], "023"),
        ({}, {"0123": -7.0, "123": NAN, "023": NAN, "013": NAN, "012": NAN}, ["0123", "123 023 013 012"], "0123"),
        ({"candidates": [0, 2]}, {"02": 0.1, "2": 0.1}, ["02", "2 0"], "2"),
        ({"candidates": "head"}, {}, ["h"], "h"),
    ],
)  # fmt: skip
def test_greedy_backward(settings: dict[str, Any], table: dict[str, float], rounds: list[str], chosen: str) -> None:
    played = play(procedures.greedy_backward(**settings), FOUR, by(table))
    assert played.rounds == [sets(each) for each in rounds]
    assert played.winner == played.chosen == sets(chosen)[0]


def subtuning(names: Candidate, evaluate: Metric, epsilon: float) -> tuple[set[str], int]:
    """The algorithm as the paper has it, with a function to call; the blocks chosen, and how often it was called."""
    chosen: set[str] = set()
    best, calls = -math.inf, 0
    while len(chosen) < len(names):
        found = []
        for name in names:
            if name not in chosen:
                calls += 1
                found.append((evaluate(tuple(sorted({*chosen, name}))), name))
        accuracy = max(metric for metric, _ in found)
        if accuracy - best < epsilon:
            break
        best = accuracy
        chosen.add(next(name for metric, name in found if metric == accuracy))
    return chosen, calls


def test_greedy_forward_against_the_algorithm_of_the_paper() -> None:
    ends = set()
    for seed in range(200):
        chance = random.Random(seed)
        worth = {frozenset(s): (chance.randrange(8) + 2 * n) / 8 for n in range(1, 5) for s in combinations(LAYERS, n)}
        epsilon = chance.choice([0.0, 0.125, 0.25])
        played = play(procedures.greedy_forward(epsilon=epsilon), FOUR, lambda c, w=worth: w[frozenset(c)])
        chosen, calls = subtuning(LAYERS, lambda c, w=worth: w[frozenset(c)], epsilon)
        assert set(played.chosen or ()) == chosen and len(played.trials) == calls
        ends.add(len(chosen))
    assert ends == {1, 2, 3, 4}


def test_random_subsets_are_all_equally_likely_and_go_by_their_seed() -> None:
    def drawn(seed: int, num_trials: int = 3) -> list[Candidate]:
        return play(procedures.random_subsets(2, num_trials, seed), FOUR, alike).trials

    assert drawn(0) == drawn(0) != drawn(1)
    every = set(combinations(LAYERS, 2))
    assert set(drawn(0, num_trials=6)) == every
    firsts = [drawn(seed, num_trials=1)[0] for seed in range(600)]
    assert set(firsts) == every and all(60 <= firsts.count(each) <= 140 for each in every)  # 100, deviation 9
    heads = play(procedures.random_subsets(1, 1, candidates="head"), FOUR, alike)
    assert heads.trials == [("head",)]


def scores(values: dict[str, float], granularity: str = "block") -> BlockScores:
    return BlockScores(values, dict.fromkeys(values, 1), {n: n for n in values}, (), "rgn", granularity, 1, "Toy")


SCORED = {"embeddings": 5.0, "0": 0.3, "1": 0.2, "2": 0.3, "3": 0.9, "head": 9.0}


@pytest.mark.parametrize(
    ("settings", "first_round"),
    [
        ({"num_candidates": 1}, "3"),
        ({"num_candidates": 2}, "0 3"),  # of equals the earlier
        ({"num_candidates": 3}, "0 2 3"),
        ({"num_candidates": 3, "num_blocks": 1, "candidates": "all"}, "e 3 h"),
    ],
)
def test_by_score_then_greedy(settings: dict[str, Any], first_round: str) -> None:
    names = [candidate[0] for candidate in sets(first_round)]
    greedy = play(procedures.greedy_forward(settings.get("num_blocks"), candidates=names), FOUR, larger)
    for given in (SCORED, scores(SCORED), dict(reversed(SCORED.items()))):
        played = play(procedures.by_score_then_greedy(given, **settings), FOUR, larger)
        assert played.rounds[0] == sets(first_round)
        assert played == greedy


def test_a_block_without_a_score_takes_no_part() -> None:
    played = play(procedures.by_score_then_greedy({"2": 0.1, "1": 0.2}, 2, num_blocks=1), FOUR, larger)
    assert played.rounds == [sets("1 2")]


def test_scores_that_change_later_change_nothing() -> None:
    mine = {"0": 1.0, "1": 0.5}
    procedure = procedures.by_score_then_greedy(mine, 1)
    mine["1"] = 2.0
    assert play(procedure, FOUR, larger).trials == [("0",)]
    assert str(procedure) == "by_score_then_greedy(scores={'0': 1.0, '1': 0.5}, num_candidates=1, epsilon=0.01)"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: procedures.top_k_jointly(0), "num_blocks=0.*top_k_jointly"),
        (lambda: procedures.top_k_jointly(True), "num_blocks=True"),
        (lambda: procedures.segments(), "parts=None and cuts=None"),
        (lambda: procedures.segments(2, cuts=[1]), "parts=2"),
        (lambda: procedures.segments(0), "parts=0 .*segments"),
        (lambda: procedures.windows(0), "width=0.*windows"),
        (lambda: procedures.windows(2, stride=0), "stride=0.*windows"),
        (lambda: procedures.windows(1.5), "width=1.5.*windows"),
        (lambda: procedures.greedy_forward(0), "num_blocks=0.*greedy_forward"),
        (lambda: procedures.greedy_forward(epsilon=-0.1), "epsilon=-0.1 "),
        (lambda: procedures.greedy_forward(epsilon=NAN), "epsilon=nan"),
        (lambda: procedures.greedy_forward(epsilon="0.1"), "epsilon='0.1'"),
        (lambda: procedures.greedy_backward(epsilon=-math.inf), "epsilon=-inf.*greedy_backward"),
        (lambda: procedures.cross_val(0), "parts=0.*cross_val"),
        (lambda: procedures.random_subsets(0, 1), "num_blocks=0.*random_subsets"),
        (lambda: procedures.random_subsets(1, 0), "num_trials=0.*random_subsets"),
        (lambda: procedures.random_subsets(1, 1, seed=None), "seed=None"),
        (lambda: procedures.by_score_then_greedy({"0": NAN}, 1), r"NaN.*0 \(nan\)"),
        (lambda: procedures.by_score_then_greedy(scores({"0.q": 1.0}, "module"), 1), "scores of modules"),
        (lambda: procedures.by_score_then_greedy(SCORED, 0), "num_candidates=0"),
        (lambda: procedures.by_score_then_greedy(SCORED, 2, 3), "num_blocks=3.*num_candidates=2"),
        (lambda: procedures.by_score_then_greedy(SCORED, 2, epsilon=-1), "epsilon=-1"),
    ],
)
def test_wrong_settings_are_refused_at_once(make: Callable[[], Procedure], why: str) -> None:
    with pytest.raises(SurgicalError, match=why):
        make()


@pytest.mark.parametrize(
    ("procedure", "why"),
    [
        (procedures.sweep([0, "haed"]), "'haed'.*'head'"),
        (procedures.sweep([]), "selects no block"),
        (procedures.top_k_jointly(5), "num_blocks=5.*top_k_jointly.*4 blocks"),
        (procedures.segments(5), "parts=5 .*segments.*4 blocks .0, 1, 2, 3."),
        (procedures.segments(cuts=[]), "selects no block"),
        (procedures.segments(cuts=[2, "head"]), "'head'.*0, 1, 2, 3"),
        (procedures.windows(5), "width=5.*windows"),
        (procedures.greedy_forward(5), "num_blocks=5.*greedy_forward"),
        (procedures.cross_val(5), "parts=5.*cross_val"),
        (procedures.random_subsets(5, 1), "num_blocks=5.*random_subsets"),
        (procedures.random_subsets(2, 7), "num_trials=7 .*6 sets of 2 of 4"),
        (procedures.by_score_then_greedy({"0": 1.0, "11": 2.0}, 1), "'11'.*Toy"),
        (procedures.by_score_then_greedy({0: 1.0}, 1), "0,.*Toy"),
        (procedures.by_score_then_greedy({"0": 1.0}, 2), "num_candidates=2 is more than .*: 1 blocks .0."),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_before_the_first_trial(procedure: Procedure, why: str) -> None:
    with pytest.raises(SurgicalError, match=why):
        next(procedure(FOUR))


def mine(blocks: BlockMap, last: int = 2) -> Any:
    """A user's own: goes up the layers until one is worse than the one before."""
    reached = -math.inf
    for name in blocks.parse(f":{last}"):
        metric = yield (name,)
        if metric < reached:
            return
        reached = metric


def other(blocks: BlockMap, last: int = 4) -> Any:
    yield [(name,) for name in blocks.names[:last]]


OWN = "surgical_own_procedure"


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / f"{OWN}.py").write_text(
        "from surgical_peft.procedures import Procedure, windows\n"
        "def mine(blocks, last=2):\n"
        "    for name in blocks.names[:last]:\n"
        "        metric = yield (name,)\n"
        "made = Procedure('made', mine, {'last': 3})\n"
        "def maker(width):\n"
        "    return windows(width)\n"
        "def no_maker():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return OWN


def test_a_users_own_generator() -> None:
    procedure = as_procedure(mine)
    assert str(procedure) == "tests.procedures.test_procedures:mine()"
    assert play(procedure, FOUR, by({"0": 0.2, "1": 0.1})) == Played([sets("0"), sets("1")], [0.2, 0.1], None)
    longer = as_procedure(partial(mine, last=4))
    assert str(longer) == "tests.procedures.test_procedures:mine(last=4)" and longer == as_procedure(mine, {"last": 4})
    assert play(longer, FOUR, alike).trials == sets("0 1 2 3")


def test_a_procedure_by_its_name(own_module: str) -> None:
    assert as_procedure("sweep") == procedures.sweep() == as_procedure(procedures.sweep())
    assert (
        as_procedure("windows", {"width": 3})
        == procedures.windows(3)
        == as_procedure(f"{own_module}:maker", {"width": 3})
    )
    assert str(as_procedure("windows", {"width": 3})) == "windows(width=3, stride=1)"
    own = as_procedure(f"{own_module}:mine", {"last": 1})
    assert str(own) == f"{own_module}:mine(last=1)" and play(own, FOUR, alike).trials == sets("e")
    assert play(as_procedure(f"{own_module}:made"), FOUR, alike).trials == sets("e 0 1")


@pytest.mark.parametrize(
    ("given", "settings", "why"),
    [
        ("swep", {}, "'swep'.*'sweep'"),
        ("procedure", {}, "procedures"),
        ("windows", {}, "{}.*windows: .*'width'"),
        ("windows", {"breadth": 3}, "{'breadth': 3}.*windows: .*breadth"),
        ("windows", {"width": 0}, "width=0"),
        (f"{OWN}:mine", {"first": 3}, "{'first': 3}: .*first"),
        (f"{OWN}:made", {"last": 3}, "{'last': 3} .*made.last=3."),
        (f"{OWN}:no_maker", {}, "'surgical_own_procedure:no_maker'.*int"),
        (procedures.sweep, {}, "procedures.sweep.."),
        (procedures.sweep(), {"candidates": "all"}, "made already"),
        (lambda blocks: iter([]), {}, "is not a procedure"),
        (partial(mine, FOUR), {}, "is not a procedure"),
        (3, {}, "3 is not a procedure"),
        (mine, {"blocks": 3}, "{'blocks': 3}"),
    ],
)
def test_what_is_no_procedure_is_refused(given: Any, settings: dict[str, Any], why: str, own_module: str) -> None:
    with pytest.raises(SurgicalError, match=why):
        as_procedure(given, settings)
