"""`surgical-peft advise`: what is probed, who is recommended, when that is not surgery, and what is left behind."""

from __future__ import annotations

import copy
import io
import json
import random
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.cli.main import main
from surgical_peft.experiments.advise import advise as advising
from surgical_peft.experiments.advise import cost
from surgical_peft.experiments.advise import successive_halving as halving
from surgical_peft.experiments.advise.advice import Advice, Difference
from surgical_peft.experiments.advise.advise import advise, plan
from surgical_peft.experiments.advise.candidates import CANDIDATES
from surgical_peft.experiments.advise.cost import CHOOSING, CostEstimate, estimate
from surgical_peft.experiments.advise.forgetting import forgetting_report
from surgical_peft.experiments.advise.report import markdown, recipe_lines, sentences, table
from surgical_peft.experiments.advise.rows import lines_of, twin_of
from surgical_peft.experiments.advise.successive_halving import (
    Candidate,
    Round,
    ShortTraining,
    ValidationJudge,
    decide,
    halve,
)
from surgical_peft.experiments.compare.methods import make_method
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks.evaluation import Measure
from surgical_peft.experiments.training.cost import Timing
from surgical_peft.experiments.training.runner import RecipeRunner
from surgical_peft.experiments.training.source_data import SourceData
from surgical_peft.experiments.training.tiny import make_tiny
from surgical_peft.scoring.selection import Selection
from tests.support.tiny import write_data, write_recipe

QUIET = Console(file=io.StringIO())
TIMING = Timing(whole=10.0, last=4.0, step=0.1, measure=1.0, start=2.0, memory=10**9)
SHORT = (Round(1 / 2), Round(1, methods=2, rates=1))


def accuracy(predictions: list[int], references: list[int]) -> float:
    return statistics.fmean(int(a == b) for a, b in zip(predictions, references, strict=True))


def bench_of(count: int, measure: Any, names_labels: bool = True) -> Any:
    def part(split: str, places: Any = range(count)) -> Any:
        return list(places)

    task = SimpleNamespace(measure=measure, names_labels=names_labels)
    return SimpleNamespace(task=task, examples={"validation": range(count)}, part=part)


def judge_of(count: int) -> ValidationJudge:
    return ValidationJudge(bench_of(count, Measure(accuracy, lambda model, batch: ([], []))))


def probe(right: list[int], share: float = 1.0, rate: float | None = 1e-3) -> ShortTraining:
    """Of a model that is right where `right` is 1, an example a group."""
    return ShortTraining(rate, share, statistics.fmean(right), tuple(([each], [1]) for each in right), 0.0)


def candidate(name: str, tuned: int, *probes: ShortTraining) -> Candidate:
    return Candidate(name, make_method(name), Selection(()), tuned, list(probes))


def rights(mean: float, seed: int, count: int = 25) -> list[int]:
    draw = random.Random(seed)
    return [int(draw.random() < mean) for _ in range(count)]


# Noise


def test_the_error_is_that_of_a_paired_mean() -> None:
    """Of a mean, the jackknife gives the textbook's standard deviation by the root of the count."""
    one, other = rights(0.8, 0), rights(0.5, 1)
    differences = [a - b for a, b in zip(one, other, strict=True)]
    found = judge_of(25).standard_error(probe(one), probe(other))
    assert found == pytest.approx(statistics.stdev(differences) / 25**0.5)
    assert judge_of(25).standard_error(probe(one), probe(one)) == 0


def test_every_example_is_in_one_group_and_the_metric_is_that_of_all() -> None:
    seen: list[int] = []

    def measure(model: Any, places: list[int]) -> float:
        seen.extend(places)
        return float(len(places))

    judge = ValidationJudge(bench_of(60, measure))
    groups = judge.read(None)  # type: ignore[arg-type]
    assert sorted(seen) == list(range(60)) and len(groups) == halving.GROUPS
    assert judge.metric(groups) == pytest.approx(60 / 25)  # of a metric of one's own the mean over groups
    pairs = [([1, 1], [1, 1]), ([0], [1])]
    assert judge_of(25).metric(pairs) == pytest.approx(2 / 3)


def test_one_pass_over_the_examples_gives_each_group_its_own() -> None:
    passes: list[int] = []

    def read(model: Any, batch: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
        passes.append(len(batch["at"]))
        return batch["at"].tolist(), (batch["at"] % 7).tolist()

    def collate(places: list[int]) -> dict[str, torch.Tensor]:
        return {"at": torch.tensor(places)}

    measure = Measure(compute=accuracy, read=read, collate=collate)
    groups = ValidationJudge(bench_of(60, measure)).read(torch.nn.Linear(1, 1))
    assert passes == [60] and len(groups) == halving.GROUPS
    assert sorted(place for predicted, _ in groups for place in predicted) == list(range(60))
    assert all(wanted == [place % 7 for place in predicted] for predicted, wanted in groups)


# The decision


def test_the_smallest_that_is_as_good_within_one_standard_error() -> None:
    base = [1] * 20 + [0] * 5
    close = [0] + [1] * 20 + [0] * 4  # two examples differ: 0 ± 1.4 of 25
    worse = [1] * 10 + [0] * 15
    full, last, head = (
        candidate("full", 100, probe(base)),
        candidate("last", 30, probe(close)),
        candidate("head", 1, probe(worse)),
    )
    chosen, tied = decide([full, last, head], judge_of(25))
    assert chosen is last and tied == [full, last]
    chosen, tied = decide([full, head], judge_of(25))
    assert chosen is full and tied == [full]


def test_the_model_as_it_is_may_be_best() -> None:
    nothing = candidate("nothing", 0, probe([1] * 20 + [0] * 5, share=0, rate=None))
    full = candidate("full", 100, probe([1] * 19 + [0, 1] + [0] * 4))
    assert decide([full, nothing], judge_of(25))[0] is nothing


def test_a_metric_that_is_not_a_number_is_never_best() -> None:
    broken = replace(probe([1] * 25), metric=float("nan"))
    other = candidate("head", 5, probe([0] * 24 + [1]))
    assert decide([candidate("full", 9, broken), other], judge_of(25))[0] is other


# Halving


class PlayedBench:
    """Trains nothing; notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float, int]] = []

    def steps(self) -> int:
        return 80

    def train(self, wrap: partial[Any], policy: Any, **settings: Any) -> tuple[Any, int]:
        candidate = wrap.args[0]
        self.asked.append((candidate.name, settings["learning_rate"], settings["max_steps"]))
        return (candidate.name, settings["learning_rate"]), 0


def test_the_better_ones_train_longer() -> None:
    metrics = {
        "full": {1e-3: 0.1, 3e-3: 0.9, 1e-2: 0.2},
        "head": {1e-3: 0.8, 3e-3: 0.7, 1e-2: 0.6},
        "last": {1e-3: 0.1, 3e-3: 0.1, 1e-2: 0.3},
    }
    judge: Any = SimpleNamespace(read=lambda model: model, metric=lambda groups: metrics[groups[0]][groups[1]])
    candidates = [candidate(name, 1) for name in metrics]
    runner: Any = PlayedBench()
    rounds = (Round(1 / 8), Round(1 / 4, methods=2, rates=2), Round(1, methods=1, rates=1))
    told: list[None] = []
    rates = [1e-3, 3e-3, 1e-2]
    halve(
        candidates, lambda _: rates, runner, Recipe(model="", data=""), judge, rounds, done=lambda: told.append(None)
    )
    expected = [(name, rate, 10) for name in metrics for rate in rates]
    expected += [("full", 3e-3, 20), ("full", 1e-2, 20), ("head", 1e-3, 20), ("head", 3e-3, 20), ("full", 3e-3, 80)]
    assert runner.asked == expected and len(told) == len(expected)
    assert candidates[0].best.share == 1 and candidates[1].best.rate == 1e-3


def test_rates_at_which_nothing_is_learnt_are_no_reason_to_stop() -> None:
    metrics = {1e-3: 0.9, 3e-3: float("nan"), 1e-2: float("nan")}
    judge: Any = SimpleNamespace(read=lambda model: model, metric=lambda groups: metrics[groups[1]])
    own, runner = candidate("full", 1), PlayedBench()
    halve([own], lambda _: list(metrics), runner, Recipe(model="", data=""), judge, [Round(1 / 4)])  # type: ignore[arg-type]
    assert own.best.rate == 1e-3


def test_no_more_is_trained_than_was_planned() -> None:
    """Of the rounds that ship."""
    judge: Any = SimpleNamespace(read=lambda model: model, metric=lambda groups: 0.5)
    candidates = [candidate(name, 1) for name in CANDIDATES if name != "nothing"]
    runner: Any = PlayedBench()
    halve(candidates, lambda _: [1e-3, 3e-3, 1e-2], runner, Recipe(model="", data=""), judge)
    methods = {made.title: made for made in map(make_method, CANDIDATES)}
    what: Any = SimpleNamespace(methods=methods, recipe=None, rates=[1e-3, 3e-3, 1e-2])
    found = estimate(what, runner, replace(TIMING, whole=2.0, step=2.0 / 80, start=0.0))  # 80 steps, and nothing else
    assert found.trainings == len(runner.asked) == 24
    trained = sum(steps for _, _, steps in runner.asked) / 80
    assert found.full_trainings == pytest.approx(trained + CHOOSING)
    assert found.seconds == pytest.approx(2 * found.full_trainings)


# What may be forgotten


def test_the_better_ones_are_those_that_forget_little_enough() -> None:
    """At each rate and among methods; the best of all trains on beside them, for what the limit costs."""
    metrics = {
        "full": {1e-3: (0.7, 0.04), 1e-2: (0.9, 0.5)},
        "head": {1e-3: (0.6, 0.05), 1e-2: (0.8, 0.06)},
        "last": {1e-3: (0.5, 0.2), 1e-2: (0.85, 0.3)},
    }
    judge: Any = SimpleNamespace(read=lambda model: model, metric=lambda groups: metrics[groups[0]][groups[1]][0])
    candidates = [replace(candidate(name, 1), max_forgetting=0.05) for name in metrics]
    runner: Any = PlayedBench()
    rounds = (Round(1 / 4), Round(1 / 2, methods=1, rates=1))
    recipe = Recipe(model="", data="")
    rates = [1e-3, 1e-2]
    halve(candidates, lambda _: rates, runner, recipe, judge, rounds, rise=lambda own: metrics[own[0]][own[1]][1])  # type: ignore[index]
    assert runner.asked[6:] == [("full", 1e-3, 40), ("full", 1e-2, 40)]
    full, head, last = candidates
    assert full.best.rate == 1e-3 and full.keeps_limit and head.best.rate == 1e-3
    assert not last.keeps_limit and last.best.rate == 1e-3  # of those that forget too much the one that forgets least
    found = forgetting_report([full], full, 0.05, judge_of_none())
    assert (found.best.rate, found.best.source_loss_rise, found.least.rate) == (1e-2, 0.5, 1e-3)
    assert found.cost is not None and found.cost.mean == pytest.approx(-0.2) and not found.none_keeps_it


def judge_of_none() -> Any:
    return SimpleNamespace(standard_error=lambda one, other: 0.01)


def test_what_did_not_end_in_a_number_keeps_no_limit() -> None:
    broken = replace(probe([1, 1]), source_loss_rise=float("nan"))
    assert not replace(candidate("full", 1, broken), max_forgetting=9.0).keeps_limit
    assert candidate("full", 1, broken).keeps_limit  # there is no limit


def test_a_limit_costs_a_training_more_in_each_later_round() -> None:
    methods = {made.title: made for made in map(make_method, CANDIDATES)}
    what: Any = SimpleNamespace(methods=methods, recipe=None, rates=[1e-3, 3e-3, 1e-2])
    runner: Any = PlayedBench()
    assert estimate(what, runner, TIMING, is_limited=True).trainings == 1 + estimate(what, runner, TIMING).trainings


@pytest.mark.parametrize(
    ("keys", "limit", "said"),
    [
        ({}, 0.05, "source_data"),
        ({"source_data": "data"}, -0.1, "-0.1"),
        ({"source_data": "data"}, float("nan"), "nan"),
        ({"source_data": "data", "new_head": True}, 0.05, "new_head"),
    ],
)
def test_a_limit_that_cannot_be_kept_track_of_is_told_before_training(
    keys: Any, limit: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecipeRunner, "__init__", lambda *_, **__: pytest.fail("it was loaded"))
    recipe = load_recipe(write_recipe(tmp_path, **keys))
    for ask in (advise, plan):
        with pytest.raises(SurgicalError, match=said):
            ask(recipe, max_forgetting=limit, console=QUIET)


def stood(metric: float, rise: float) -> dict[str, Any]:
    return {"title": "full", "rate": 1e-2, "metric": metric, "source_loss_rise": rise}


def test_what_a_limit_costs_is_said() -> None:
    found = {"limit": 0.05, "none_keeps_it": False, "best": stood(0.86, 0.31), "least": stood(0.7, 0.01)}
    advice = played("head", ["full", "head"])
    keys = {**advice.to_json(), "source_examples": 1000}
    costly = Advice.from_json({**keys, "forgetting": {**found, "cost": {"mean": -0.07, "standard_error": 0.02}}})
    said = " ".join(sentences(costly))
    assert "at most 0.05 nats" in said and "costs 7 ± 2 points of accuracy" in said and "by 0.31" in said
    free = Advice.from_json({**keys, "forgetting": {**found, "cost": None}})
    assert "costs nothing" in " ".join(sentences(free))
    none = {**keys, "recommended": None, "forgetting": {**found, "none_keeps_it": True, "cost": None}}
    said = " ".join(sentences(Advice.from_json(none)))
    assert "none keeps the limit" in said and "the least is 0.01, by full at the rate 0.01" in said
    assert "Nothing has learned" not in said
    constant = {"answer": "'a'", "metric": 0.8}
    unlearned = {**none, "constant": constant, "forgetting": {**found, "cost": None}}
    said = " ".join(sentences(Advice.from_json(unlearned)))
    assert "Nothing has learned yet: no way of tuning within the limit" in said and "costs nothing" not in said
    assert "Without the limit full at the rate 0.01 (accuracy 86 %) is best" in said


# What is said


def played(recommended: str, tied: list[str], kind: str | None = None, **head: Any) -> Advice:
    rows = [
        {
            "method": name,
            "title": name,
            "surgery": name == "head",
            "same_as": None,
            "blocks": ["head"] if name == "head" else [],
            "tuned_parameters": tuned,
            "probes": [{"rate": 1e-3, "share": 0.5, "metric": value, "seconds": 1.0}],
            "rate": None if name == "nothing" else 1e-3,
            "at_edge": False,
            "validation": value,
            "to_best": gap,
        }
        for name, tuned, value, gap in (
            ("nothing", 0, 0.70, {"mean": -0.10, "standard_error": 0.02}),
            ("full", 100, 0.80, None),
            ("head", 5, 0.79, {"mean": -0.01, "standard_error": 0.008}),
        )
    ]
    signature = {"gradients": {"0": 0.1, "head": 2.0}, "loss": 2.0, "source_loss": 1.0, "moving": ["0"], "kind": kind}
    signature |= {"moved": {"0": 0.3, "head": 0.1}, "floor": {"0": 0.1, "head": 0.1}}
    rows[2] |= head
    tuned = {"tuned_parameters": 5, "all_parameters": 100}
    return Advice.from_json(
        {
            "date": "2026-11-30",
            "versions": {"torch": "2"},
            "machine": "one",
            "recipe": {},
            "metric": "accuracy",
            "validation_examples": 50,
            "share": 0.5,
            "surgery": recommended == "head",
            "recommended": {"method": recommended, "title": recommended, "blocks": ["head"], "lines": {}, **tuned},
            "tied": tied,
            "all_tied": len(tied) == 3,
            "unfit": {},
            "methods": rows,
            "scores": {"criterion": "probe", "values": {}},
            "signature": signature,
            "cost": {"trainings": 1, "planned": 1, "full_trainings": 1, "seconds_each": 1, "seconds": 1},
        }
    )


@pytest.mark.parametrize(
    ("recommended", "tied", "said"),
    [
        ("head", ["full", "head"], ["Tune head at the rate 0.001 (head): 5.0% of the parameters", "1 ± 0.8 points"]),
        (
            "full",
            ["full"],
            ["Do not use surgery here: tune all blocks", "The best choice of blocks, head, is 1 ± 0.8"],
        ),
        (
            "nothing",
            ["full", "head", "nothing"],
            ["cannot tell the last candidates apart", "here, nor tune at all", "longest none"],
        ),
    ],
)
def test_surgery_is_recommended_only_where_it_is_as_good(recommended: str, tied: list[str], said: list[str]) -> None:
    found = " ".join(sentences(played(recommended, tied)))
    for each in said:
        assert each in found
    assert ("Do not use surgery" in found) == (recommended != "head")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("input", "features move from the first block on, most in block 0"),
        ("features", "features move from block 0 on"),
        ("output", "the output moved"),
        ("nothing", "nothing moved"),
        (None, "with source_data in the recipe"),
    ],
)
def test_the_signature_is_said_and_decides_nothing(kind: str | None, said: str) -> None:
    *advice, signature = sentences(played("head", ["full", "head"], kind))
    assert said in signature and "largest in head" in signature
    assert advice == sentences(played("head", ["full", "head"]))[:-1]


# The whole


@pytest.fixture(scope="module")
def advised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Advice]:
    folder = tmp_path_factory.mktemp("advised")
    write_data(folder / "data", count=24)
    path = write_recipe(folder, rates=[1e-2], num_train_epochs=1, source_data="data", blocks=[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advising, "ROUNDS", SHORT)
        patch.setattr(advising, "halve", partial(halve, rounds=SHORT))
        patch.setattr(halving, "GROUPS", 6)
        patch.setattr(advising, "FEWEST", 6)  # of the signature
        return path, advise(load_recipe(path), console=QUIET)


def test_it_leaves_advice_table_and_picture(advised: tuple[Path, Advice]) -> None:
    path, advice = advised
    folder = path.parent / "run" / "advice"
    written = json.loads((folder / "advice.json").read_text())
    assert written == advice.to_json() and Advice.from_json(written) == advice
    assert (folder / "advice.md").read_text() == markdown(advice)
    assert (folder / "signature.png").read_bytes().startswith(b"\x89PNG")
    assert [row.method for row in advice.methods] == list(CANDIDATES)
    shown = io.StringIO()
    Console(file=shown, width=80).print(table(advice))
    assert all(row.title in shown.getvalue() for row in advice.methods) and "…" not in shown.getvalue()
    assert max(map(len, shown.getvalue().splitlines())) <= 80 and "standard error" in shown.getvalue()
    assert markdown(advice).count("\n| ") == 2 + 8 + 2 + 5  # the candidates, and the blocks of the model


def test_each_training_tells_what_it_forgot(advised: tuple[Path, Advice]) -> None:
    _, advice = advised
    rows = {row.method: row for row in advice.methods}
    assert advice.source_examples == 24 and rows["nothing"].source_loss_rise == 0.0 and advice.forgetting is None
    assert all(probe.source_loss_rise is not None for row in rows.values() for probe in row.probes)
    assert "source loss" in str(table(advice)) and "in nats" in markdown(advice)


def test_the_recommended_is_the_smallest_of_those_as_good(advised: tuple[Path, Advice]) -> None:
    _, advice = advised
    rows = {row.method: row for row in advice.methods}
    last = {name: row for name, row in rows.items() if row.validation is not None}
    assert len(last) == 1 + 2 and "nothing" in last  # those of the last round, and the model as it is
    best = max(row.validation for row in last.values())
    for name, row in last.items():
        gap = row.to_best or Difference(0.0, 0.0)
        assert gap.mean == pytest.approx(row.validation - best)
        assert (name in advice.tied) == (-gap.mean <= gap.standard_error)
    name = advice.recommended.method
    assert rows[name].tuned_parameters == min(rows[each].tuned_parameters for each in advice.tied)
    assert advice.surgery == rows[name].surgery
    assert advice.cost.trainings == sum(len(row.probes) for row in rows.values()) - 1
    assert rows["nothing"].probes[0].share == 0


def test_evidence_stands_beside_it(advised: tuple[Path, Advice]) -> None:
    _, advice = advised
    blocks = ["embeddings", "0", "1", "final_norm", "head"]
    assert list(advice.signature.gradients) == blocks == list(advice.signature.moved)
    assert set(advice.scores.values) == set(blocks) and advice.scores.criterion == "probe"


@pytest.mark.parametrize("name", CANDIDATES)
def test_what_to_write_into_the_recipe_is_taken_there(name: str, advised: tuple[Path, Advice]) -> None:
    path, advice = advised
    own = candidate(name, 1, probe([1], rate=None if name == "nothing" else 1e-2))
    row = next(row for row in advice.methods if row.method == name)
    own = replace(own, selection=Selection(tuple(row.blocks)))
    lines = lines_of(own, load_recipe(path))
    with_lines = replace(advice, recommended=replace(advice.recommended, lines=lines))
    assert [yaml.safe_load(line) for line in recipe_lines(with_lines)] == [
        {key: value} for key, value in lines.items()
    ]
    if name == "nothing":
        assert lines == {}
        return
    written = path.with_name(f"{name}.yaml")
    written.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **lines}))
    recipe = load_recipe(written)
    assert recipe.arguments().learning_rate == 1e-2
    assert recipe.config().blocks == lines["blocks"] and (recipe.make_policy() is not None) == (name == "layer_decay")


def test_what_the_recipe_says_of_choosing_is_taken_back(tmp_path: Path) -> None:
    """The short trainings did without, so the lines alone have to give what was measured."""
    keys = {
        "blocks": "auto",
        "criterion": "rgn",
        "num_blocks": 1,
        "policy": "auto_rgn",
        "target_modules": ["attention"],
    }
    path = write_recipe(tmp_path, **keys)
    own = replace(candidate("head", 1, probe([1], rate=1e-2)), selection=Selection(("head",)))
    lines = [yaml.safe_load(f"{key}: {json.dumps(value)}") for key, value in lines_of(own, load_recipe(path)).items()]
    path.write_text(
        yaml.safe_dump({**yaml.safe_load(path.read_text()), **{k: v for each in lines for k, v in each.items()}})
    )
    recipe = load_recipe(path)
    config = recipe.config()
    assert (config.blocks, config.target_modules, config.criterion, config.num_blocks) == (["head"], None, None, None)
    assert recipe.make_policy() is None and recipe.arguments().learning_rate == 1e-2


def test_two_that_tune_the_same_are_trained_once() -> None:
    head = Candidate("head", make_method("head"), Selection(("head",)), 5)
    auto = Candidate("auto", make_method("auto"), Selection(("head",)), 5)
    full, decay = candidate("full", 9), candidate("layer_decay", 9)
    every = {each.name: each for each in (full, decay, head, auto)}
    assert [twin_of(each, every) for each in every.values()] == [None, None, None, "head"]


# Whether anything has learned


def read_as(predictions: list[int], references: list[int]) -> ShortTraining:
    groups = tuple(([one], [other]) for one, other in zip(predictions, references, strict=True))
    return ShortTraining(1e-3, 1.0, accuracy(predictions, references), groups, 0.0)


def test_the_constant_answer_is_the_best_of_all_classes() -> None:
    references = [0] * 15 + [1] * 10
    found = judge_of(25).constant(read_as([1] * 25, references))
    assert found is not None and found[0] == 0 and found[1].metric == pytest.approx(15 / 25)


def test_what_has_no_classes_has_no_constant_answer() -> None:
    bare = ValidationJudge(bench_of(25, Measure(accuracy, lambda model, batch: ([], [])), names_labels=False))
    own = ValidationJudge(bench_of(25, lambda model, examples: 0.5))
    assert bare.constant(probe([1] * 25)) is None and own.constant(probe([1] * 25)) is None


def test_where_nothing_has_learned_nothing_is_recommended(tmp_path: Path) -> None:
    """Each way answered one class for all, and the smallest of them was recommended: "Tune head"."""
    write_data(tmp_path / "data", count=24)
    path = write_recipe(tmp_path, rates=[1e-9, 1e-8], max_steps=2)
    advice = advise(load_recipe(path), console=QUIET)
    assert advice.recommended is None and not recipe_lines(advice)
    assert advice.constant is not None and advice.constant.metric == pytest.approx(1 / 3)
    said = " ".join(advice.sentences)
    assert "Nothing has learned yet" in said and "1e-09, 1e-08" in said and "max_steps: 2" in said
    by_epochs = replace(advice, recipe={**advice.recipe, "max_steps": -1})
    assert "num_train_epochs: 2" in " ".join(sentences(by_epochs))
    assert Advice.from_json(advice.to_json()) == advice
    shown = str(table(advice))
    assert "recommended" not in shown and advice.constant.answer in shown and "Nothing" in markdown(advice)


# Rates


@pytest.mark.parametrize(
    ("keys", "rates"),
    [
        ({"rates": [3e-3, 1e-3]}, [1e-3, 3e-3]),
        ({"rates": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}, [1e-4, 1e-3, 1e-2]),
        ({"rates": None, "learning_rate": 3e-3}, [1e-3, 3e-3, 9e-3]),
    ],
)
def test_rates_are_the_recipes_or_around_its_rate(keys: dict[str, Any], rates: list[float], tmp_path: Path) -> None:
    what = advising.comparison_of(load_recipe(write_recipe(tmp_path, **keys)))
    assert what.rates == pytest.approx(rates)


def test_other_draws_and_methods_are_not_read(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, methods=["full"], seeds=[3, 4], rate_seeds=2, draws=["data", "data"], seed=7)
    what = advising.comparison_of(load_recipe(path))
    assert what.seeds == [7] and what.recipe.draws is None
    assert [each.title for each in map(make_method, CANDIDATES)] == list(what.methods)


# The command, and bad input


# Other models


def played_advice(
    recipe: Recipe,
    metrics: float,
    monkeypatch: pytest.MonkeyPatch,
    read: Any = lambda self, model: (),
    metric: Any = None,
    limit: float | None = None,
) -> Advice:
    """The advice on a recipe where no step is taken and every model measures the same, unless `metric` says else."""
    monkeypatch.setattr(advising, "estimate", lambda *_, **__: CostEstimate(8, 1.0, 1.0, 1.0, 1))
    monkeypatch.setattr(RecipeRunner, "train", lambda self, wrap, **_: (wrap(copy.deepcopy(self.model)).train(), 0))
    monkeypatch.setattr(ValidationJudge, "read", read)
    monkeypatch.setattr(ValidationJudge, "metric", metric or (lambda self, groups: metrics))
    monkeypatch.setattr(
        "surgical_peft.experiments.compare.methods.chosen.choose_blocks",
        lambda model, config, *_, **__: (_first(config), None),
    )
    return advise(recipe, max_forgetting=limit, console=QUIET)


def _first(config: SurgicalConfig) -> SurgicalConfig:
    return replace(config, blocks=["1"], criterion=None)


def test_what_does_not_fit_the_model_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's head is its embeddings, which are tuned with the first third."""
    sizes = {"model_type": "gpt2", "n_embd": 8, "n_layer": 3, "n_head": 2, "n_positions": 64}
    recipe = make_tiny(Recipe(model="hub/model", data="hub/data", task="causal_lm", tiny=sizes), tmp_path)
    advice = played_advice(recipe, -1.0, monkeypatch)
    assert [row.method for row in advice.methods] == [name for name in CANDIDATES if name != "head"]
    assert list(advice.unfit) == ["head"] and "block 'head' does not exist" in advice.unfit["head"]
    assert "Not tried: head." in markdown(advice)


def test_a_new_head_is_never_to_be_left_untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = played_advice(load_recipe(write_recipe(tmp_path, new_head=True)), 0.5, monkeypatch)
    assert "nothing" not in advice.tied and advice.recommended.method != "nothing"
    assert "head untrained" in markdown(advice)


@pytest.mark.parametrize(("limit", "chosen"), [(9.0, "full"), (0.1, "head"), (0.0, None)])
def test_the_best_that_keeps_the_limit_is_recommended(
    limit: float, chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Played so that who tunes more is better and forgets more, from nothing on."""

    def tuned(model: Any) -> int:
        return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)

    def read(judge: Any, model: Any) -> tuple[Any, ...]:
        return (tuned(model) * model.training,)  # the source model is in eval mode

    recipe = load_recipe(write_recipe(tmp_path, source_data="data"))
    monkeypatch.setattr(ValidationJudge, "constant", lambda *_: None)
    monkeypatch.setattr(ValidationJudge, "standard_error", lambda *_: 0.0)
    monkeypatch.setattr(SourceData, "loss", lambda self, model: 1.0 + read(None, model)[0] / 10_000)
    advice = played_advice(recipe, 0.0, monkeypatch, read, lambda _, groups: groups[0] / 100_000, limit)
    assert advice.chosen == chosen and advice.forgetting is not None
    rows = {row.method: row for row in advice.methods}
    if limit == 0.1:
        assert advice.forgetting.cost is not None
        assert advice.forgetting.best.title == rows["full"].title and "The limit costs" in " ".join(advice.sentences)
        assert rows["full"].forgets_more and "forgets more" in str(table(advice)) and not rows["head"].forgets_more
    if limit == 0.0:
        assert "none keeps the limit" in markdown(advice) and not recipe_lines(advice)
    if limit == 9.0:
        assert "The limit costs nothing" in " ".join(advice.sentences)
    assert Advice.from_json(json.loads(json.dumps(advice.to_json()))) == advice


def test_nothing_that_gave_a_number_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SurgicalError, match=r"accuracy.*\[0\.01"):
        played_advice(load_recipe(write_recipe(tmp_path)), float("nan"), monkeypatch)
    assert not (tmp_path / "run" / "advice").exists()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["surgical-peft", "advise", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_dry_run_trains_a_few_steps_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path)
    monkeypatch.setattr(advising, "halve", lambda *_, **__: pytest.fail("it trained"))
    assert run(monkeypatch, str(path), "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out).keys() == {
        *("trainings", "full_trainings", "seconds_each", "seconds", "memory")
    }
    assert not (tmp_path / "run").exists()


def test_the_command_prints_the_advice(
    advised: tuple[Path, Advice], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, advice = advised
    monkeypatch.setattr(advising, "advise", lambda *_, **__: advice)
    assert run(monkeypatch, str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == advice.to_json()
    assert run(monkeypatch, str(path)) == 0
    shown = capsys.readouterr().out
    assert all(line in shown for line in recipe_lines(advice)) and str(Path("run") / "advice") in shown


def test_the_command_takes_a_limit(
    advised: tuple[Path, Advice],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, advice = advised
    assert run(monkeypatch, str(write_recipe(tmp_path)), "--max-forgetting", "0.05") == 2
    assert "source_data" in capsys.readouterr().err
    given: list[Any] = []
    monkeypatch.setattr(advising, "advise", lambda *_, **keys: given.append(keys["max_forgetting"]) or advice)
    assert run(monkeypatch, str(path), "--max-forgetting", "0.05") == run(monkeypatch, str(path)) == 0
    assert given == [0.05, None]


def test_the_command_prints_what_does_not_fit(
    advised: tuple[Path, Advice], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stood in advice.md alone."""
    path, advice = advised
    unfit = {"head": "block 'head' does not exist [here]"}
    monkeypatch.setattr(advising, "advise", lambda *_, **__: replace(advice, unfit=unfit))
    assert run(monkeypatch, str(path)) == 0
    assert "Not tried: head. block 'head' does not exist [here]" in " ".join(capsys.readouterr().out.split())


def test_an_error_that_is_no_number_is_left_out() -> None:
    """It was a TypeError, after all trainings."""
    advice = played("full", ["full"], to_best={"mean": -0.01, "standard_error": None})
    said = " ".join(sentences(advice))
    assert "1 points worse than the best: that may be noise" in said and "±" not in said
    assert "| -1 |" in markdown(advice)


def test_what_is_as_good_is_not_called_worse() -> None:
    """It was `-0 ± 0 points worse`."""
    equal = {"validation": 0.8, "to_best": {"mean": 0.0, "standard_error": 0.0}}
    said = " ".join(sentences(played("head", ["full", "head"], **equal)))
    assert "On validation data it is as good as full, and it tunes fewer parameters." in said and "-0" not in said


def spoil(folder: Path, how: str) -> dict[str, Any]:
    if how == "no validation split":
        write_data(folder / "bare", ("train", "test"))
        return {"data": "bare"}
    if how == "something else in its place":
        (folder / "run" / "advice").mkdir(parents=True)
        (folder / "run" / "advice" / "thesis.txt").write_text("")
        return {}
    if how == "too few to measure on":
        write_data(folder / "few", count=8)
        return {"data": "few"}
    return {"source_data": {"data": "data", "severty": 3}} if how == "a wrong key" else {"source_data": "nowhere"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no validation split", "validation"),
        ("something else in its place", "would be lost"),
        ("too few to measure on", "8 validation examples"),
        ("a wrong key", "severity"),
        ("no source", "nowhere"),
    ],
)
def test_bad_input_is_told_before_any_training(
    how: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = spoil(tmp_path, how)
    recipe = load_recipe(write_recipe(tmp_path, **keys))
    monkeypatch.setattr(RecipeRunner, "train", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(SurgicalError, match=said):
        advise(recipe, console=QUIET)


def test_the_plan_is_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "time_trainings", lambda recipe, runner: replace(TIMING, whole=1.5, step=0.125))
    found = plan(load_recipe(write_recipe(tmp_path, rates=[1e-3, 1e-2])))
    assert found.seconds == pytest.approx(2.0 + 1.5 * found.full_trainings) and found.trainings > 7  # of 12 steps


def test_steps_of_a_training(tmp_path: Path) -> None:
    for keys, steps in (({"num_train_epochs": 2}, 12), ({"max_steps": 5}, 5), ({"num_train_epochs": 1.5}, 9)):
        recipe = load_recipe(write_recipe(tmp_path, **keys))
        assert RecipeRunner(recipe).steps() == steps
