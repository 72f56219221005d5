"""`surgical-peft compare`: rates chosen on validation, nothing trained twice, and what is said of noise."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset, Features, Image, load_dataset
from PIL import Image as PILImage
from rich.console import Console
from scipy import stats
from transformers import ViTConfig, ViTForImageClassification

from surgical_peft import SurgicalError
from surgical_peft.cli.main import main
from surgical_peft.experiments.compare import cost
from surgical_peft.experiments.compare.compare import compare, plan
from surgical_peft.experiments.compare.comparison import Comparison, Job
from surgical_peft.experiments.compare.cost import CostEstimate
from surgical_peft.experiments.compare.findings import Findings
from surgical_peft.experiments.compare.jobs import KINDS, TIMED, JobRunner, train_method
from surgical_peft.experiments.compare.loaded import LoadedData
from surgical_peft.experiments.compare.lr_grid import best_rate, is_at_edge, next_rate
from surgical_peft.experiments.compare.methods import Method, make_method
from surgical_peft.experiments.compare.preflight import check
from surgical_peft.experiments.compare.report import ComparisonReport, Difference
from surgical_peft.experiments.compare.statistics import crossed_interval, t_interval, t_quantile
from surgical_peft.experiments.compare.tables import interval_in_words, markdown, sentences, table
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks.image_classification import _Images
from surgical_peft.experiments.training.cost import Timing
from surgical_peft.experiments.training.profiling import FEW, MOST, LiveTensors, ms_ratio, step_costs
from surgical_peft.experiments.training.runner import RecipeRunner
from surgical_peft.experiments.training.workers import WorkerPool
from tests.support.cli import QUIET, timeless
from tests.support.tiny import write_data, write_recipe

BROKEN = "tests.experiments.compare.test_compare:broken"


def settle(recipe: Path, means: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Have jobs find played values instead of training; gives the jobs that were done."""
    done: list[Job] = []

    def play(job_runner: JobRunner, job: Job) -> None:
        done.append(job)
        title, rate = job.method, job.rate
        value = means[title](rate, job.seed) if title in means and rate is not None else 0.5
        found: dict[str, Any] = {
            "choice": {"blocks": [title], "seconds": 1.0},
            "training": {
                "blocks": [],
                "validation": value,
                "tuned_parameters": 5,
                "bytes": 100,
                "seconds": 2.0,
            },
            "test": {"test": value / 2},
            "costs": {name: {"ms": 3.0, "peak_bytes": 1000.0} for name in job_runner.comparison.methods},
        }[job.kind]
        path = job_runner.findings.path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"asked": job_runner.comparison.asked(job), "found": found}))

    monkeypatch.setattr(JobRunner, "do", play)
    return done


# Statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 14, 29, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99, 1 - 0.05 / 15])
def test_quantiles_are_students(confidence: float, freedom: int) -> None:
    assert t_quantile(confidence, freedom) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 7, 15])
def test_the_paired_interval_is_that_of_scipy(count: int) -> None:
    draw = random.Random(count)
    one, other = ([draw.gauss(mean, 1) for _ in range(count)] for mean in (3, 2))
    found = t_interval([a - b for a, b in zip(one, other, strict=True)])
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.is_clear == (expected.low > 0 or expected.high < 0)


def test_of_one_value_there_is_no_interval() -> None:
    found = t_interval([0.3])
    assert (found.mean, found.low, found.high, found.is_clear) == (0.3, None, None, False)
    with pytest.raises(SurgicalError, match="0 values"):
        t_interval([])


def test_of_equal_values_there_is_no_interval() -> None:
    """It was one without any width, and clear of zero. The differences here are equal but for rounding."""
    found = t_interval([0.81 - 0.71, 0.82 - 0.72, 0.83 - 0.73])
    assert found.mean == pytest.approx(0.1) and (found.low, found.high, found.is_clear) == (None, None, False)
    assert crossed_interval([[0.1, 0.1], [0.1, 0.1]]).high is None


def test_the_wider_of_two_intervals_counts() -> None:
    by_draw, by_source = t_interval([0.15, 0.4, 0.35]), t_interval([0.2, 0.4])
    found = crossed_interval([[0.1, 0.2, 0.3], [0.2, 0.6, 0.4]])
    assert by_source.low is not None and by_draw.low is not None and by_source.low < by_draw.low
    assert (found.low, found.high) == pytest.approx((by_source.low, by_source.high))
    one = [0.1, 0.3, 0.2]
    assert crossed_interval([one]) == t_interval(one)
    assert crossed_interval([[each] for each in one]) == t_interval(one)


@pytest.mark.parametrize("spread", [(1, 1, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1)])
@pytest.mark.parametrize(("sources", "draws"), [(2, 3), (3, 5), (5, 5)])
def test_the_interval_holds_zero_as_often_as_it_says(sources: int, draws: int, spread: tuple[int, int, int]) -> None:
    """No true difference; trainings share draws and source models. As independent pairs they were told apart."""
    random_of = random.Random(f"{sources} {draws} {spread}")
    of_source, of_draw, own = spread
    count, held, held_as_pairs = 600, 0, 0
    for _ in range(count):
        by_source = [random_of.gauss(0, of_source) for _ in range(sources)]
        by_draw = [random_of.gauss(0, of_draw) for _ in range(draws)]
        found = [[one + other + random_of.gauss(0, own) for other in by_draw] for one in by_source]
        held += not crossed_interval(found).is_clear
        held_as_pairs += not t_interval([value for each in found for value in each]).is_clear
    assert held / count > 0.93
    assert of_source == of_draw == 0 or held_as_pairs / count < 0.91


# Rates


@pytest.mark.parametrize(
    ("means", "best", "then"),
    [
        ({1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.6}, 3e-3, None),  # inside
        ({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7}, 1e-2, 3.33e-2),  # the grid's own factor at that side
        ({1e-3: 0.7, 3e-3: 0.6, 1e-2: 0.5}, 1e-3, 3.33e-4),
        ({1e-3: 0.1, 3e-3: 0.2, 1e-2: 0.3, 3.33e-2: 0.4}, 3.33e-2, 0.111),
        ({1e-3: 0.1, 3e-3: 0.2, 1e-2: 0.3, 3.33e-2: 0.4, 0.111: 0.5}, 0.111, None),  # twice is enough
        ({1e-3: 0.5, 3e-3: 0.5, 1e-2: 0.5}, 1e-3, 3.33e-4),  # of equals the lowest
        ({1e-3: float("nan"), 3e-3: 0.2, 1e-2: float("nan")}, 3e-3, None),
        ({1e-3: float("nan"), 3e-3: float("nan"), 1e-2: -5.0}, 1e-2, 3.33e-2),
        ({1e-3: 0.1, 3e-3: 0.2, 1e-2: float("inf")}, 3e-3, None),  # an overflow is no success
        ({1e-3: float("nan"), 3e-3: float("nan"), 1e-2: float("nan")}, 1e-3, 3.33e-4),  # lower ones may do
    ],
)
def test_the_rate_and_what_the_grid_lacks(means: dict[float, float], best: float, then: float | None) -> None:
    assert best_rate(means) == best
    assert next_rate([1e-3, 3e-3, 1e-2], means) == (None if then is None else pytest.approx(then))


def test_one_rate_alone_is_no_grid() -> None:
    assert next_rate([1e-3], {1e-3: 0.5}) is None
    assert not is_at_edge({1e-3: 0.5})


def test_rates_are_chosen_by_the_mean_over_seeds_and_grids_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a played table: head rises for ever; full is best inside by the mean, and in no seed by itself."""
    full = {1e-3: (0.9, 0.2), 4e-3: (0.8, 0.7), 1e-2: (0.1, 0.9)}
    table_of = {
        "full fine-tuning": lambda rate, seed: full[rate][seed],
        "head": lambda rate, seed: min(0.99, 10 * rate),
    }
    methods = ["nothing", "full", "head", {"layer_decay": {"rates": [1e-4]}}]
    path = write_recipe(tmp_path, methods=methods, rates=[1e-3, 4e-3, 1e-2], seeds=[0, 1])
    done = settle(path, table_of, monkeypatch)
    report = compare(load_recipe(path), console=QUIET).to_json()
    rows = {row["method"]: row for row in report["methods"]}
    assert rows["full fine-tuning"]["rate"] == 4e-3
    assert rows["full fine-tuning"]["rates"] == pytest.approx({"0.001": 0.55, "0.004": 0.75, "0.01": 0.5})
    assert rows["head"]["rate"] == pytest.approx(6.25e-2) and rows["head"]["at_edge"]
    assert len(rows["head"]["rates"]) == 5
    assert rows["layer decay 0.75"]["rates"] == {"0.0001": 0.5} and not rows["layer decay 0.75"]["at_edge"]
    tested = [job for job in done if job.kind == "test"]
    assert {(job.method, job.rate) for job in tested} == {(title, row["rate"]) for title, row in rows.items()}
    assert len(tested) == 2 * 4  # only the chosen rate is measured on test data
    assert rows["head"]["to_full"]["mean"] == pytest.approx(
        statistics.fmean(a - b for a, b in zip(rows["head"]["test"], rows["full fine-tuning"]["test"], strict=True))
    )
    assert len(done) == len(set(done))


def test_some_seeds_choose_the_rates_and_the_others_are_trained_at_the_best_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning is best at 4e-3 by the first two seeds; by all four it would be at 1e-2."""
    full = {1e-3: (0.2, 0.2, 0.2, 0.2), 4e-3: (0.8, 0.7, 0.1, 0.1), 1e-2: (0.1, 0.1, 0.9, 0.9)}
    table_of = {
        "full fine-tuning": lambda rate, seed: full[rate][seed],
        "head": lambda rate, seed: math.nan if (rate, seed) == (4e-3, 3) else 0.5 + (rate == 4e-3),
    }
    keys: dict[str, Any] = {"methods": ["nothing", "full", "head"], "rates": [1e-3, 4e-3, 1e-2]}
    path = write_recipe(tmp_path, **keys, seeds=[0, 1, 2, 3], rate_seeds=2)
    assert plan_of(load_recipe(path), monkeypatch).trainings == 2 * (3 * 2 + 2)
    done = settle(path, table_of, monkeypatch)
    report = compare(load_recipe(path), console=QUIET).to_json()
    rows = {row["method"]: row for row in report["methods"]}
    assert rows["full fine-tuning"]["rate"] == 4e-3
    assert rows["full fine-tuning"]["rates"]["0.004"] == pytest.approx(0.75)
    assert rows["full fine-tuning"]["validation"] == [0.8, 0.7, 0.1, 0.1]
    trained = [job for job in done if job.kind == "training" and job.method == "full fine-tuning"]
    assert Counter(job.rate for job in trained) == {1e-3: 2, 4e-3: 4, 1e-2: 2}
    # A rate that diverges from a further seed is not the best one.
    assert rows["head"]["rate"] == 1e-3 and rows["head"]["rates"]["0.004"] is None
    assert {job.rate for job in done if job.kind == "test" and job.method == "head"} == {1e-3}
    assert "2 of 4 seeds" in (tmp_path / "run" / "comparison" / "table.md").read_text()
    with pytest.raises(SurgicalError, match="rate_seeds"):
        compare(load_recipe(write_recipe(tmp_path, **keys, seeds=[0, 1], rate_seeds=3)), console=QUIET)


# What diverges


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf")])
def test_a_method_that_diverges_is_told_so_and_compared_with_nothing(
    lost: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to end the comparison, after all trainings."""
    table_of = {
        "full fine-tuning": lambda rate, seed: 0.6 + seed / 10,
        "head": lambda rate, seed: lost if seed else 0.9,
        "first third": lambda rate, seed: lost if rate > 1e-3 else 0.8 + rate + seed / 100,
    }
    path = write_recipe(tmp_path, methods=["full", "head", "first"], rates=[1e-3, 1e-2], seeds=[0, 1])
    done = settle(path, table_of, monkeypatch)
    report = compare(load_recipe(path), console=QUIET).to_json()
    _, head, first = report["methods"]
    assert first["rate"] == 1e-3 and first["to_full"] is not None and report["compared"] == 1
    assert head["to_full"] is None and head["test"] == [None, None] and head["validation"] == [0.9, None]
    assert set(head["rates"].values()) == {None} and len(head["rates"]) == 4  # lower ones were tried as well
    assert not [job for job in done if job.kind == "test" and job.method == "head"]
    assert report["sentences"][0].startswith("first third is best")
    assert report["sentences"][-1] == "At every rate diverged: head."
    folder = tmp_path / "run" / "comparison"
    json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    (row,) = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| head")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["diverged", "-"]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    Console(file=io.StringIO()).print(table(ComparisonReport.from_json(report)))


def test_full_fine_tuning_that_diverges_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, methods=["full", "head"], rates=[1e-3, 1e-2], seeds=[0])
    done = settle(path, {"full fine-tuning": lambda rate, seed: float("nan")}, monkeypatch)
    with pytest.raises(SurgicalError, match=r"diverged: accuracy .* rates 1e-05, 0.0001, 0.001, 0.01, .* lower rates"):
        compare(load_recipe(path), console=QUIET)
    count = len(done)
    with pytest.raises(SurgicalError, match="diverged"):
        compare(load_recipe(path), console=QUIET)
    assert len(done) == count  # what is finished is kept


def test_a_test_metric_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, methods=["nothing", "full", "head"], rates=[1e-3], seeds=[0])
    settle(path, {}, monkeypatch)
    recipe = load_recipe(path)
    play = JobRunner.do

    def lose(title: str) -> None:
        def do(job_runner: JobRunner, job: Job) -> None:
            play(job_runner, job)
            if job.kind == "test" and job.method == title:
                path = job_runner.findings.path(job)
                path.write_text(path.read_text().replace('{"test": 0.25}', '{"test": NaN}'))

        monkeypatch.setattr(JobRunner, "do", do)

    lose("no adaptation")
    report = compare(recipe, tmp_path / "one", console=QUIET).to_json()
    assert report["methods"][0]["to_full"] is None and report["compared"] == 1
    lose("full fine-tuning")
    with pytest.raises(SurgicalError, match=r"full.*0.001.*accuracy"):
        compare(recipe, tmp_path / "other", console=QUIET)


# What is said


FOLDER = Path(__file__).parents[3] / "benchmarks" / "compare"
REPORTS = {path.parent.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/report.json"))}
REPORT = replace(ComparisonReport.from_json(REPORTS["noise"]), sources=["vit"], seeds=[0, 1, 2])
ROW = replace(REPORT.methods[0], method="full fine-tuning", rate=1e-3, to_full=None)


@pytest.mark.parametrize("name", REPORTS)
def test_reports_of_earlier_versions_are_read(name: str) -> None:
    """And told as they were: table.md lies beside each, as the version that made it wrote it."""
    report = ComparisonReport.from_json(REPORTS[name])
    assert report.to_json() == REPORTS[name]
    assert json.dumps(report.to_json(), indent=2) + "\n" == (FOLDER / name / "report.json").read_text()
    assert markdown(report) == (FOLDER / name / "table.md").read_text()
    assert (sentences(report), interval_in_words(report)) == (report.sentences, report.interval)


def told(**differences: Sequence[float]) -> list[str]:
    full = [0.70, 0.72, 0.71]
    rows = [replace(ROW, test=full)]
    for name, values in differences.items():
        interval, wide = t_interval(values), t_interval(values, 1 - 0.05 / len(differences))
        test: list[float | None] = [a + b for a, b in zip(full, values, strict=False)]
        to_full = Difference(interval.mean, interval.bounds, wide.bounds)
        rows.append(replace(ROW, method=name, test=test, to_full=to_full))
    return sentences(replace(REPORT, methods=rows, compared=len(rows) - 1))


@pytest.mark.parametrize(
    ("differences", "first", "second"),
    [
        ({"a": [0.1, 0.101, 0.1], "b": [0.0, 0.01, 0.0]}, "a is best: 81.0 %", "more than noise: widened for the 2"),
        ({"a": [0.1, 0.101, 0.1]}, "10.0 points above full fine-tuning (95 %", "more than noise: the interval is"),
        ({"a": [0.1, -0.05, 0.1]}, "a is best", "not more than noise: the interval holds zero"),
        ({"a": [0.10, 0.05, 0.09], **{f"m{i}": [0.0, 0.0, 0.0] for i in range(9)}}, "a is best", "may be luck"),
        ({"a": [-0.1, -0.12, -0.1]}, "full fine-tuning is best: 71.0 %", "more than noise"),
        ({"a": [0.1]}, "a is best", "With one training each nothing can be said"),
        ({"a": [0.1, 0.1, 0.1]}, "10.0 points above full fine-tuning.", "Every training differs by the same"),
    ],
)
def test_what_won_and_whether_it_is_noise(differences: dict[str, Sequence[float]], first: str, second: str) -> None:
    found = told(**differences)
    assert len(found) == 2
    assert first in found[0] and second in found[1]


# The whole


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A comparison of two source models and two draws."""
    folder = tmp_path_factory.mktemp("compared")
    write_data(folder / "data", count=24)
    write_data(folder / "other", count=24)
    methods = ["nothing", "full", {"top_k": {"criterion": "rgn", "k": 1}}]
    path = write_recipe(folder, methods=methods, rates=[3e-3, 1e-2], seeds=[0, 1], draws=["data", "other"])
    keys = {"source_data": "other", "test_data": ["data", "other"], "num_train_epochs": 1}
    recipe = load_recipe(write_recipe(folder, **_keys(path), **keys))
    return path, compare(recipe, console=QUIET).to_json()


def _keys(path: Path) -> dict[str, Any]:
    import yaml

    given = yaml.safe_load(path.read_text())
    return {key: given[key] for key in ("methods", "rates", "seeds", "draws")}


def test_it_leaves_report_table_and_picture(compared: tuple[Path, dict[str, Any]]) -> None:
    path, report = compared
    folder = path.parent / "run" / "comparison"
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "table.md").read_text()
    assert text == markdown(ComparisonReport.from_json(report))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip(" *") for row in rows[2:]] == ["no adaptation", "full fine-tuning", "top 1 by rgn"]
    assert len({row.count("|") for row in rows}) == 1 and "forgets | source loss |" in rows[0]
    assert sum("**" in row for row in rows) >= 1
    assert not (path.parent / "run" / "weights").exists()
    shown = io.StringIO()
    Console(file=shown, width=80).print(table(ComparisonReport.from_json(report)))
    for row in report["methods"]:
        assert row["method"] in shown.getvalue()
    assert "…" not in shown.getvalue() and "in nats" in shown.getvalue()


def test_rows_say_what_was_measured(compared: tuple[Path, dict[str, Any]]) -> None:
    _, report = compared
    nothing, full, chosen = report["methods"]
    assert full["to_full"] is None and full["ms_ratio"] == 1
    assert nothing["source_loss_rise"] == [0.0, 0.0] and all(full["source_loss_rise"])
    assert nothing["forgotten"] == [0.0, 0.0] and nothing["rate"] is None and nothing["ms"] is None
    assert set(full["tuned_parameters"]) == {5411}
    assert all(len(blocks) == 1 for blocks in chosen["blocks"])
    assert chosen["bytes"][0] < full["bytes"][0] > 5411 * 4
    assert chosen["peak_bytes"] > 0 and full["peak_bytes"] > 4 * 5411 * 4  # weights, gradients and two moments
    assert chosen["choosing_seconds"] > 0 == full["choosing_seconds"]
    differences = [a - b for a, b in zip(chosen["test"], full["test"], strict=True)]
    assert chosen["to_full"]["mean"] == pytest.approx(statistics.fmean(differences))


def test_test_data_are_measured_as_one(compared: tuple[Path, dict[str, Any]]) -> None:
    path, report = compared
    comparison = Comparison(load_recipe(path))
    job_runner = JobRunner(comparison, path.parent / "run")
    assert len(job_runner.data.test_examples(0, 1)) == 2 * 24
    assert all(round(value * 48, 6).is_integer() for row in report["methods"] for value in row["test"])


def test_the_same_again_trains_nothing_and_says_the_same(
    compared: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, report = compared
    monkeypatch.setattr(JobRunner, "do", lambda self, job: pytest.fail(f"{job} was done again"))
    assert timeless(compare(load_recipe(path), console=QUIET).to_json()) == timeless(report)


def test_a_changed_recipe_shares_only_what_is_the_same(
    compared: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = compared
    recipe = load_recipe(path)
    one = Comparison(recipe)
    job = Job("training", 0, 1, "full fine-tuning", 3e-3)
    longer = replace(recipe, training={**recipe.training, "num_train_epochs": 2})
    elsewhere = replace(recipe, training={**recipe.training, "output_dir": "elsewhere"})
    for other in (longer, replace(recipe, label_map=[2, 1, 0])):
        assert Comparison(other).name_of(job) != one.name_of(job)
    for other in (elsewhere, replace(recipe, rates=[1e-2]), replace(recipe, methods=["full"])):
        assert Comparison(other).name_of(job) == one.name_of(job)
    first = replace(job, seed=0)
    assert one.name_of(first) != one.name_of(job) != one.name_of(replace(job, rate=1e-2))
    write_data(path.parent / "more", count=30)
    assert recipe.draws is not None
    changed = replace(recipe, draws=[recipe.draws[0], str(path.parent / "more")])
    assert Comparison(changed).name_of(job) != one.name_of(job)
    assert Comparison(changed).name_of(first) == one.name_of(first)


def test_methods_that_chose_the_same_blocks_share_their_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Job] = []
    do = JobRunner.do
    monkeypatch.setattr(JobRunner, "do", lambda self, job: (done.append(job), do(self, job)))  # type: ignore[misc]
    monkeypatch.setattr(
        "surgical_peft.experiments.compare.jobs.step_costs",
        lambda names, steps: {name: {"ms": 1.0 + at, "peak_bytes": 0.0} for at, name in enumerate(names)},
    )
    write_data(tmp_path / "data", count=12)
    methods = ["full", "head", {"blocks": {"names": ["head"]}}, "layer_decay", "lp_ft"]
    path = write_recipe(tmp_path, methods=methods, rates=[1e-3, 1e-2], seeds=[0, 1])
    report = compare(load_recipe(path), console=QUIET).to_json()
    _, head, same, *others = report["methods"]
    assert {**timeless(head), "method": ""} == {**timeless(same), "method": ""}
    assert head["ms"] == same["ms"]
    count = Counter(job.kind for job in done if job.method in ("head", "blocks head"))
    assert (count["choice"], count["training"], count["test"]) == (4, 2 * len(head["rates"]), 2)
    # What steers the rates, or trains otherwise, is told apart, whatever blocks it tunes.
    assert {job.method for job in done if job.kind == "test"} >= {row["method"] for row in others}
    before = len(done)
    shorter = load_recipe(write_recipe(tmp_path, methods=["full", "last", {"blocks": {"names": "head"}}], seeds=[1]))
    compare(replace(shorter, rates=[1e-3, 1e-2]), console=QUIET)
    assert not [job for job in done[before:] if job.kind == "training" and job.method == "blocks head"]


def test_a_source_model_more_is_paired_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    shutil.copytree(tmp_path / "model", tmp_path / "second")
    (tmp_path / "second" / "note.txt").write_text("another one")
    keys = {"methods": ["full", "head"], "rates": [1e-2], "seeds": [4, 5], "sources": ["second"]}
    path = write_recipe(tmp_path, **keys)
    done = settle(path, {"head": lambda rate, seed: seed / 10}, monkeypatch)
    report = compare(load_recipe(path), console=QUIET).to_json()
    assert {(job.source, job.seed) for job in done if job.kind == "training"} == {(0, 4), (0, 5), (1, 4), (1, 5)}
    assert report["methods"][1]["test"] == [0.2, 0.25, 0.2, 0.25]
    as_of_draws = t_interval([0.2 - 0.25, 0.25 - 0.25])
    assert report["methods"][1]["to_full"]["interval"] == pytest.approx([as_of_draws.low, as_of_draws.high])
    assert report["interval"].startswith("In brackets its 95 % t interval, the wider of")
    assert report["interval"] in (tmp_path / "run" / "comparison" / "table.md").read_text()
    assert "2 trainings of each of 2 source models" in report["sentences"][0]


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "surgical_peft", "compare", *map(str, words)]


def test_killed_it_resumes_and_gives_the_same_report(tmp_path: Path) -> None:
    write_data(tmp_path / "data", count=12)
    keys = {"methods": ["full", "head"], "rates": [3e-3, 1e-2], "seeds": [0], "num_train_epochs": 1}
    path = write_recipe(tmp_path, **keys)
    process = subprocess.Popen(command(path, "--jobs", "2"), stdout=subprocess.DEVNULL)
    runs = tmp_path / "run" / "runs"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(runs.glob("training-*"))) < 2:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=30)[1]  # none is left behind
    finished = {each.name: each.stat().st_mtime_ns for each in runs.glob("training-*.json")}
    assert len(finished) >= 2
    assert not (tmp_path / "run" / "comparison").exists()
    report = compare(load_recipe(path), console=QUIET).to_json()
    assert all((runs / name).stat().st_mtime_ns == at for name, at in finished.items())  # nothing was trained twice
    alone = compare(load_recipe(path), tmp_path / "alone", console=QUIET).to_json()
    assert timeless({**report, "machine": ""}) == timeless({**alone, "machine": ""})


def plan_of(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, jobs: int = 1) -> CostEstimate:
    """The plan of a comparison on a machine whose times are played."""
    timing = Timing(whole=10.0, last=4.0, step=0.1, measure=1.0, start=2.0, memory=10**9)
    monkeypatch.setattr(cost, "timed_at_once", lambda jobs, *_: timing)
    return plan(recipe, jobs=jobs)


def test_dry_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["nothing", "full", "bvg_ls"]
    recipe = load_recipe(write_recipe(tmp_path, methods=methods, rates=[1e-2, 1e-3], seeds=[0, 1]))
    found = plan_of(recipe, monkeypatch, jobs=2)
    assert (found.trainings, found.done, found.more) == (2 * 2 + 3 * 2, 0, 2 * 2 * 2)
    shared = (10 * 10.0 + 3 * 2 * 1.0) / min(2, os.cpu_count() or 1)  # trainings, and the test data of each method
    steps = RecipeRunner(recipe).steps()
    base = 10.0 - 1.0 - steps * 0.1
    short = 2 * base + TIMED * (0.1 + 2 * 0.1)  # bvg_ls has a policy, so that it is timed in each of two epochs
    assert found.seconds == pytest.approx(2.0 + short + shared)
    assert "2 jobs" in found.lines()[1] and "2.0 GB" in found.lines()[3]
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(Findings, "is_done", lambda findings, job: True)
    assert plan(replace(recipe, methods=["nothing", "full"]), jobs=2).seconds < 10.0  # no training is left


# Bad input


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"methods": None}, "nothing to compare"),
        ({"methods": ["full", "hed"]}, "'hed'.*'head'"),
        ({"methods": ["full", {"lora": {"rnk": 8}}]}, "'rank'.*alpha, head, target_modules, rates"),
        ({"methods": ["full", {"lora": {"rank": 0}}]}, "rank=0"),
        ({"methods": ["full", {"head": {"rates": []}}]}, r"head: rates: \[\]"),
        ({"methods": ["full", {"head": {"rates": [1e-3, 0]}}]}, "above 0"),
        ({"methods": ["full", {"head": {}, "last": {}}]}, "not a method"),
        ({"methods": ["full", {"top_k": {"criterion": "rgm"}}]}, "'rgn'"),
        ({"methods": ["full", "full"]}, "full.*twice"),
        ({"methods": ["head"]}, "full"),
        ({"methods": ["full"], "rates": [1e-2, 1e-2]}, "twice"),
        ({"methods": ["full"], "sources": ["other", "other"]}, "sources.*twice"),
        ({"methods": ["full"], "seeds": [0, 1], "draws": ["data"]}, "draws.*1.*2 seeds"),
        ({"methods": ["full"], "source_data": "data", "new_head": True}, "source_data.*new_head"),
        ({"methods": ["full"], "source_data": {"data": "data", "lable_map": []}}, "'label_map'"),
        ({"methods": ["full", "lp_ft"], "num_train_epochs": 1}, "lp_ft.*head"),
        (
            {"methods": ["full", {"first": {"k": 9}}]},
            "first 9.*ViTForImageClassification.*k=9",
        ),
        ({"methods": ["full", {"lp_ft": {"epochs": 9}}], "num_train_epochs": 3}, "9 epochs.*3"),
        (
            {"methods": ["full", {"lp_ft": {"epochs": 9}}], "max_steps": 12},
            "epochs=9.*max_steps=12",
        ),
        ({"methods": ["full", "lp_ft"], "max_steps": 1}, "epochs=None.*max_steps=1"),
        ({"methods": ["full", {"blocks": {"names": ["haed"]}}]}, "haed"),
        (
            {"methods": ["full", BROKEN]},
            "broken.*ViTForImageClassification.*Target",
        ),
        ({"methods": ["full", {"top_k": {"criterion": "rgn", "k": 9}}]}, "top 9.*rgn.*1 to 5"),
        (
            {"methods": ["full", {"top_k": {"criterion": "rgn", "num_batches": 0}}]},
            "num_batches=0.*top_k",
        ),
        ({"methods": ["full", {"auto": {"criterion": "rgm"}}]}, "'rgn'"),
        ({"methods": ["full", {"auto": {"num_blocks": 9}}]}, "auto, 9 blocks.*num_blocks=9.*1 to 5"),
        ({"methods": ["full", "auto"], "per_device_train_batch_size": 64}, "2 batches"),
        (
            {"methods": ["full", {"searched": {"procedure": "windows", "options": {"width": 7}}}]},
            "windows.*width=7",
        ),
    ],
)
@pytest.mark.parametrize("command", [plan, compare])
def test_what_is_wrong_is_said_before_anything_is_done(
    command: Any, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Also by a dry run, which used to pass over what does not fit the model."""
    with pytest.raises(SurgicalError, match=message):
        command(load_recipe(write_recipe(tmp_path, **keys), allow_code=True))
    assert not (tmp_path / "run").exists()


def test_all_misfits_are_told_at_once(tmp_path: Path) -> None:
    methods = [
        "full",
        {"first": {"k": 9}},
        "head",
        "lp_ft",
        BROKEN,
        {"blocks": {"names": ["7"]}},
    ]
    recipe = load_recipe(write_recipe(tmp_path, methods=methods, num_train_epochs=1), allow_code=True)
    with pytest.raises(SurgicalError, match="4 of 6") as told:
        compare(recipe, console=QUIET)
    lines = str(told.value).splitlines()[1:]
    assert [line.partition(" does not fit ViT")[0] for line in lines] == [
        "- first 9",
        "- LP-FT",
        "- broken",
        "- blocks 7",
    ]
    assert "k=9" in lines[0] and "half of all epochs" in lines[1] and "Target modules" in lines[2]


def test_each_source_model_is_asked(tmp_path: Path) -> None:
    """The second one has three layers, the first two."""
    write_recipe(tmp_path)
    config = ViTConfig.from_pretrained(tmp_path / "model", num_hidden_layers=3)
    ViTForImageClassification(config).save_pretrained(tmp_path / "second")
    shutil.copy(tmp_path / "model" / "preprocessor_config.json", tmp_path / "second")
    methods = ["full", {"last": {"k": 3}}]
    recipe = load_recipe(write_recipe(tmp_path, methods=methods, sources=["second"]))
    with pytest.raises(SurgicalError, match=r"last 3.*ViTForImageClassification.*/model.*k=3"):
        compare(recipe, console=QUIET)
    other = replace(recipe, model=str(tmp_path / "second"), sources=[recipe.model])
    with pytest.raises(SurgicalError, match=r"last 3.*ViTForImageClassification.*/model.*k=3"):
        compare(other, console=QUIET)


def test_what_does_not_fit_is_found_without_any_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = ["full", "head", "auto", {"top_k": {"criterion": "rgn"}}, {"searched": {"procedure": "sweep"}}, "lora"]
    recipe = load_recipe(write_recipe(tmp_path, methods=methods))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a gradient"))
    comparison = Comparison(recipe)
    check(comparison, LoadedData(comparison), WorkerPool(1, QUIET))
    assert not (tmp_path / "run").exists()


def test_no_weights_are_copied_to_find_out(tmp_path: Path) -> None:
    """A copy of a large model for each method took half the time of a dry run, and twice the memory."""
    given: list[torch.nn.Module] = []

    def wrap(model: torch.nn.Module, *_: Any) -> torch.nn.Module:
        given.append(model)
        return model

    comparison = Comparison(load_recipe(write_recipe(tmp_path, methods=["full", "first"])))
    mine = Method("mine", wrap=wrap)
    comparison.methods = {**comparison.methods, "mine": mine}
    data = LoadedData(comparison)
    source = data.runner(comparison.firsts[0]).model
    before = {name: value.clone() for name, value in source.state_dict().items()}
    check(comparison, data, WorkerPool(1, QUIET))
    (copied,) = given
    assert data.runner(comparison.firsts[0]).model is source  # nor was it loaded twice
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in copied.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in source.named_parameters()
    ]
    assert not any(weight.count_nonzero() for weight in copied.parameters())
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())


def broken() -> Method:
    """A user's own that PEFT refuses."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["no_such_module"])
    return Method("broken", wrap=lambda model, selection, recipe: get_peft_model(model, config))


def test_the_draws_tell_the_split_all_of_them(tmp_path: Path) -> None:
    """The first one spoke for all, and what was measured on validation data was called test."""
    for name, splits in {"one": ("train", "test"), "two": ("train",)}.items():
        write_data(tmp_path / name, splits, count=15)
    draws = [str(tmp_path / "one"), str(tmp_path / "two")]
    recipe = load_recipe(write_recipe(tmp_path, methods=["full"], seeds=[0, 1], draws=draws))
    assert Comparison(recipe).split == "validation"


@pytest.mark.parametrize(("missing", "told_on"), [("validation", "test"), ("test", "validation")])
def test_a_split_that_is_missing(missing: str, told_on: str, tmp_path: Path) -> None:
    """A share of train is held out for validation, which is also told where there is no test split."""
    write_data(tmp_path / "data", tuple({"train", "validation", "test"} - {missing}), count=15)
    job_runner = JobRunner(Comparison(load_recipe(write_recipe(tmp_path, methods=["full", "head"]))), tmp_path / "run")
    check(job_runner.comparison, job_runner.data, WorkerPool(1, QUIET))
    examples = job_runner.data.runner(job_runner.comparison.firsts[0]).examples
    assert len(examples["train"]) + len(examples["validation"]) == (15 if missing == "validation" else 30)
    assert job_runner.comparison.split == told_on
    assert len(job_runner.data.test_examples(0, job_runner.comparison.seeds[0])) == 15


def spoil(folder: Path, split: str, row: int, image: Any) -> None:
    """Put another image into a row of a split."""
    data = load_dataset("parquet", data_files=str(folder / f"{split}.parquet"), split="train")
    images = data["image"][:]
    images[row] = image
    features = Features({"image": Image(), "label": data.features["label"]})
    Dataset.from_dict({"image": images, "label": data["label"][:]}, features=features).to_parquet(
        folder / f"{split}.parquet"
    )


def truncated() -> dict[str, Any]:
    whole = io.BytesIO()
    PILImage.new("RGB", (64, 64), "red").save(whole, "png")
    return {"path": None, "bytes": whole.getvalue()[:-60]}


@pytest.mark.parametrize("where", ["data/train", "data/validation", "other/train", "tested/test", "origin/test"])
@pytest.mark.parametrize("image", [None, truncated()], ids=["missing", "truncated"])
def test_a_bad_example_is_told_before_anything_is_done(where: str, image: Any, tmp_path: Path) -> None:
    """One in a test split ended a comparison after all trainings; one in train was blamed on a method."""
    for name in ("data", "other", "tested", "origin"):
        write_data(tmp_path / name, count=12)
    folder, split = where.split("/")
    spoil(tmp_path / folder, split, 7, image)
    keys = {"draws": ["data", "other"], "seeds": [0, 1], "test_data": ["data", "tested"], "source_data": "origin"}
    recipe = load_recipe(write_recipe(tmp_path, methods=["full", "auto"], **keys))
    with pytest.raises((SurgicalError, OSError)) as told:
        compare(recipe, console=QUIET)
    assert "auto" not in str(told.value) and "does not fit" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_each_example_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check, and not again by any job, whatever its draw: each process made all of them."""
    made: list[Any] = []
    read = _Images.__getitem__

    def counting(images: _Images, place: int) -> Any:
        made.append((images.seeds, place))
        return read(images, place)

    write_data(tmp_path / "data", count=12)
    write_data(tmp_path / "other", count=12)
    keys = {"draws": ["data", "other"], "seeds": [0, 1], "num_train_epochs": 1}
    path = write_recipe(tmp_path, methods=["full", "head"], **keys)
    job_runner = JobRunner(Comparison(load_recipe(path)), tmp_path / "run", tmp_path / "made")
    monkeypatch.setattr(_Images, "__getitem__", counting)
    check(job_runner.comparison, job_runner.data, WorkerPool(1, QUIET))
    again = {pair for pair in made if pair[1] > 0}  # the first tells the shape as well
    assert len(again) == 3 * 11 and all(made.count(pair) == 2 for pair in again)  # once of each draw
    made.clear()
    for job in job_runner.comparison.trainings("full fine-tuning", 1e-2):
        job_runner.do(job)
        job_runner.do(replace(job, kind="test"))
    assert not [pair for pair in made if pair[1] > 0]


@pytest.mark.parametrize("unlabelled", [True, "online"])
def test_no_augmented_copies_are_made_to_check_images(
    unlabelled: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They took ten times as long as all images, of four streams ten minutes."""
    read: list[int] = []
    image = _Images._image
    monkeypatch.setattr(_Images, "_image", lambda images, place: read.append(place) or image(images, place))
    monkeypatch.setattr(_Images, "copies", lambda *_: pytest.fail("copies"))
    keys = {"methods": ["full", "head"], "unlabelled": unlabelled, "num_train_epochs": None}
    comparison = Comparison(load_recipe(write_recipe(tmp_path, **keys)))
    check(comparison, LoadedData(comparison, tmp_path / "made"), WorkerPool(1, QUIET))
    assert len(set(read)) > 10
    assert not list((tmp_path / "made").rglob("train.pt"))


def test_what_fails_on_the_way_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path, methods=["full", "head"], num_train_epochs=1))

    def failing(job_runner: JobRunner, job: Job) -> dict[str, Any]:
        if job.method == "head":
            raise SurgicalError("the disk is full.")
        return train_method(job_runner, job)

    with monkeypatch.context() as patch:
        patch.setitem(KINDS, "training", failing)
        with pytest.raises(SurgicalError, match="head: the disk is full"):
            compare(recipe, console=QUIET)
    assert len(list(tmp_path.glob("run/runs/training-*"))) == 1
    assert len(compare(recipe, console=QUIET).methods) == 2


@pytest.mark.parametrize("place", ["comparison/thesis.tex", "weights/mine.safetensors", "weights/mine/x.safetensors"])
def test_a_folder_with_something_else_is_not_touched(place: str, tmp_path: Path) -> None:
    """`weights/` was deleted at the end, whatever it held."""
    precious = tmp_path / "run" / place
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(SurgicalError, match="would be"):
        compare(load_recipe(write_recipe(tmp_path, methods=["full"])), console=QUIET)
    assert precious.read_text() == "mine"


def test_one_bad_line_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path, methods=["full", "lorra"])
    monkeypatch.setattr(sys, "argv", ["surgical-peft", "compare", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert "did you mean 'lora'" in told and "Traceback" not in told


# What a step costs


def test_live_tensors_are_counted_until_they_are_freed() -> None:
    weight, inputs = torch.zeros(256, 128, requires_grad=True), torch.ones(64, 256)
    with LiveTensors() as tensors:
        tensors.count(weight)
        assert tensors.bytes == 256 * 128 * 4
        product = inputs @ weight
        assert tensors.bytes == (256 * 128 + 64 * 128) * 4
        view = product[:3].t()
        assert tensors.bytes == (256 * 128 + 64 * 128) * 4  # no memory of its own
        del product, view
        assert tensors.bytes == 256 * 128 * 4
    assert tensors.peak == (256 * 128 + 64 * 128) * 4


def steps_of(
    speed: Callable[[int], float], monkeypatch: pytest.MonkeyPatch, planned: float = math.inf, **ms: float
) -> dict[str, dict[str, Any]]:
    """Costs of played trainings of 2 epochs with 2 steps; `speed` slows down the machine in each training in turn."""
    now, ran = [0.0], [0]

    def training(each: float) -> Callable[[Any], None]:
        def train(watch: Any) -> None:
            callback, slow = watch(torch.nn.Linear(1, 1)), speed(ran[0])
            ran[0] += 1
            callback.on_train_begin(None, None, None)
            for _ in range(2):
                callback.on_epoch_begin(None, None, None)
                for disturbed in (5, 1):
                    callback.on_step_begin(None, None, None)
                    now[0] += each * slow * disturbed / 1000
                    callback.on_pre_optimizer_step(None, None, None)
                    callback.on_step_end(None, None, None)

        return train

    monkeypatch.setattr(
        "surgical_peft.experiments.training.profiling.time", SimpleNamespace(perf_counter=lambda: now[0])
    )
    return step_costs({name: training(each) for name, each in ms.items()}, planned)


def test_the_time_of_a_step_does_not_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of all rounds compared a quiet moment of one method with a busy one of another: 30 % apart."""
    slow = random.Random(0)
    by_round = [slow.uniform(1, 3) for _ in range(40)]
    found = steps_of(lambda ran: by_round[ran // 3] * slow.uniform(1, 1.1), monkeypatch, full=10, a=5, b=20)
    assert len(found["a"]["rounds"]) == MOST  # they took less than the time there is
    assert found["a"]["ms"] == statistics.median(found["a"]["rounds"])
    assert ms_ratio(found["a"], found["full"]) == pytest.approx(0.5, rel=0.04)
    assert ms_ratio(found["b"], found["full"]) == pytest.approx(2, rel=0.04)
    assert ms_ratio(found["full"], found["full"]) == 1


def test_slow_steps_are_timed_in_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = steps_of(lambda ran: 1.0, monkeypatch, full=1000, a=500)
    assert len(found["a"]["rounds"]) == FEW
    assert found["a"]["ms"] == pytest.approx(500)


@pytest.mark.parametrize(("planned", "rounds"), [(0, 1), (950, 1), (970, 2), (10_000, MOST)])
def test_timing_costs_a_twentieth_of_the_trainings_or_is_one_round(
    planned: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round of both methods takes as long as 24 of the planned steps."""
    found = steps_of(lambda ran: 1.0, monkeypatch, planned, full=10, a=5)
    assert len(found["full"]["rounds"]) == len(found["a"]["rounds"]) == rounds


def test_costs_from_before_rounds_were_kept() -> None:
    assert ms_ratio({"ms": 3.0, "peak_bytes": 1.0}, {"ms": 6.0, "peak_bytes": 1.0}) == 0.5


def test_a_method_of_a_file_is_known_by_its_contents(tmp_path: Path) -> None:
    found = tmp_path / "search.json"
    found.write_text("one")
    path = write_recipe(tmp_path, methods=["full", {"lora": {"rank": 2}}])
    recipe = load_recipe(path)
    comparison = Comparison(recipe)
    comparison._given["LoRA r=2"] = {"searched": {"result": str(found)}}
    job = Job("training", 0, 0, "LoRA r=2", 1e-2)
    before = comparison.name_of(job)
    elsewhere = found.rename(tmp_path / "moved.json")
    comparison._given["LoRA r=2"] = {"searched": {"result": str(elsewhere)}}
    assert comparison.name_of(job) == before
    elsewhere.write_text("two")
    assert comparison.name_of(job) != before
    assert make_method({"lora": None}).title == "LoRA r=8"
