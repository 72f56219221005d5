"""`surgical-peft search`: one command that searches, resumes, shares its work, and leaves table and picture."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

from surgical_peft import BlockMap, SurgicalError, procedures
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.search import search as recipe_search
from surgical_peft.experiments.search.objective import RecipeObjective
from surgical_peft.experiments.search.search import plan, search
from surgical_peft.experiments.training.cost import Timing
from surgical_peft.scoring.progress import Stages
from surgical_peft.search.proposals import count_trainings
from surgical_peft.search.result import SearchResult, SearchTrial
from tests.support.cli import QUIET, run
from tests.support.played import BLOCKS as MAP
from tests.support.tiny import write_data, write_recipe

BLOCKS = ("embeddings", "0", "1", "final_norm", "head")


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder / 'study.db'}"
    (study,) = optuna.get_all_study_summaries(storage)
    return optuna.load_study(study_name=study.study_name, storage=storage).trials


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "surgical_peft", "search", *map(str, words)]


def test_it_leaves_study_result_table_and_picture(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, seeds=[0, 1]))
    result = search(recipe, console=QUIET)
    assert result.trainings == 2 * 4  # two layers, all and head
    folder = tmp_path / "run" / "search"
    assert SearchResult.load(folder / "search.json") == result
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert [row.split("|")[1].strip(" *") for row in rows] == ["0", "1", "all", "head"]
    assert f"{result.metric:.4f}" in table and "8 trainings" in table
    assert sum("**" in row for row in rows) == 1
    assert {each.name for each in (tmp_path / "run").iterdir()} == {"search", "study.db", "study.db.guard"}
    assert len(trials_of(tmp_path / "run")) == 8
    assert trials_of(tmp_path / "run")[0].user_attrs["notes"]["tuned_parameters"] > 0


def test_the_same_again_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    first = search(recipe, console=QUIET)
    monkeypatch.setattr(RecipeObjective, "__call__", lambda *_: pytest.fail("trained again"))
    assert search(recipe, console=QUIET) == first


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, procedure="prefix", seeds=[0, 1])
    alone = search(load_recipe(path), tmp_path / "alone", console=QUIET)
    both = search(load_recipe(path), tmp_path / "both", jobs=2, console=QUIET)
    assert [trial.metric for trial in both.trials] == [trial.metric for trial in alone.trials]
    assert both.best.blocks == alone.best.blocks


def test_killed_it_resumes_with_every_trial_once(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, seeds=[0, 1])
    process = subprocess.Popen(command(path, "--jobs", "2"), stdout=subprocess.PIPE, start_new_session=True)
    database = tmp_path / "run" / "study.db"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if database.exists() and _finished(tmp_path / "run") >= 2:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = _finished(tmp_path / "run")
    assert 2 <= done < 8
    name = f"{path.stem} sweep"
    result = search(load_recipe(path), console=QUIET, name=name)
    assert result.trainings == 8
    complete = [trial for trial in trials_of(tmp_path / "run") if trial.state.name == "COMPLETE"]
    assert len(complete) == 8
    fresh = search(load_recipe(path), tmp_path / "fresh", console=QUIET)
    assert [trial.metric for trial in result.trials] == [trial.metric for trial in fresh.trials]


def _finished(folder: Path) -> int:
    """How many trials are complete. Optuna's own reader would make the tables if the search has not yet, beside it."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True)) as database:
        try:
            return database.execute("SELECT COUNT(*) FROM trials WHERE state = 'COMPLETE'").fetchone()[0]
        except sqlite3.OperationalError:  # no tables yet
            return 0


def test_another_recipe_under_the_same_name_is_refused_with_both(tmp_path: Path) -> None:
    search(load_recipe(write_recipe(tmp_path, num_train_epochs=1)), console=QUIET)
    other = load_recipe(write_recipe(tmp_path, num_train_epochs=2))
    with pytest.raises(SurgicalError, match=r"training \{'num_train_epochs': 1\}.*training \{'num_train_epochs': 2\}"):
        search(other, console=QUIET)
    write_data(tmp_path / "data", count=24)  # the same words, other images
    same = load_recipe(write_recipe(tmp_path, num_train_epochs=1))
    with pytest.raises(SurgicalError, match=r"training \{'data': 'data sha256:.*training \{'data': 'data sha256:"):
        search(same, console=QUIET)
    with pytest.raises(SurgicalError, match="'corruption': 'contrast'"):
        search(replace(same, corruption="contrast"), console=QUIET)
    assert len(trials_of(tmp_path / "run")) == 4


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    precious = tmp_path / "run" / "search" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(SurgicalError, match="would be lost"):
        search(load_recipe(write_recipe(tmp_path)), console=QUIET)
    assert precious.read_text() == "mine"


def test_a_failed_write_keeps_the_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SearchResult, "save", full)
        with pytest.raises(OSError, match="No space"):
            search(recipe, console=QUIET)
    assert not (tmp_path / "run" / "search").exists()
    monkeypatch.setattr(RecipeObjective, "__call__", lambda *_: pytest.fail("trained again"))
    assert search(recipe, console=QUIET).trainings == 4


def test_scores_are_made_for_a_procedure_that_asks_for_them(tmp_path: Path) -> None:
    keys = {"procedure": "by_score_then_greedy", "procedure_options": {"num_candidates": 1}, "criterion": "random"}
    result = search(load_recipe(write_recipe(tmp_path, **keys, num_batches=1)), console=QUIET)
    assert result.trainings == 1
    assert "scores=" in result.procedure


def test_pruned_trainings_are_told_apart(tmp_path: Path) -> None:
    keys = {"pruner": "PercentilePruner", "pruner_options": {"percentile": 1e-9, "n_startup_trials": 1}}
    recipe = load_recipe(write_recipe(tmp_path, **keys, rates=[1e-1, 1e-5], num_train_epochs=3))
    result = search(recipe, console=QUIET)
    states = [trial.state for trial in result.trials]
    assert set(states) == {"complete", "pruned"}
    assert [trial.state.name for trial in trials_of(tmp_path / "run")].count("PRUNED") == states.count("pruned")
    table = (tmp_path / "run" / "search" / "table.md").read_text()
    assert "1 of 2 pruned" in table


@pytest.mark.parametrize(
    ("procedure", "count"),
    [
        (procedures.sweep(), 14),
        (procedures.greedy_forward(), 78),
        (procedures.greedy_forward(num_blocks=3), 12 + 11 + 10),
        (procedures.prefix(), 13),
        (procedures.contiguous(), 78),
        (procedures.top_k_jointly(3), 12 + 2),
    ],
    ids=str,
)
def test_trainings_are_counted_without_training(procedure: procedures.Procedure, count: int) -> None:
    assert count_trainings(procedure, MAP) == count
    assert count_trainings(procedure, MAP, rates=[1e-3, 1e-2], seeds=[0, 1, 2]) == 6 * count


def test_how_many_trainings_the_users_own_procedure_does_is_not_known(tmp_path: Path) -> None:
    def same_forever(blocks: BlockMap) -> Any:
        while True:
            yield blocks.parse([0])

    assert count_trainings(same_forever, MAP) is None
    with pytest.raises(SurgicalError, match="more than 100 trainings"):
        count_trainings(procedures.random_subsets(num_blocks=2, num_trials=60), MAP, rates=[1, 2], max_trials=100)
    assert "left" not in shown([SearchTrial(("0",), 0.5, seconds=30.0)], most=None, trainings_each=1)


def test_a_plan_trains_next_to_nothing_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(whole=10.0, last=4.0, step=0.1, measure=1.0, start=2.0, memory=10**9)
    monkeypatch.setattr(recipe_search, "timed_at_once", lambda jobs, *_: timing)
    found = plan(load_recipe(write_recipe(tmp_path, rates=[1e-2, 1e-3], seeds=[0, 1, 2])), jobs=2)
    assert found.trainings == 6 * 4 and found.seconds_each == 10.0
    # block 0 and all blocks cost a whole training, block 1 and the head that of the last layer
    assert found.seconds == pytest.approx(2.0 + 6 * (10 + 4 + 4 + 10) / min(2, os.cpu_count() or 1))
    assert "2 jobs" in found.lines()[2] and "2.0 GB" in found.lines()[3]
    assert not (tmp_path / "run").exists()


def shown(finished: Sequence[SearchTrial], **how: Any) -> str:
    """The stage of a search that has finished these, one of them when it began, after ten seconds."""
    with Stages(QUIET) as stages:
        progress = recipe_search._Progress(stages, **how)
        progress(finished[:1])
        progress(finished)
        assert stages._stage is not None
        stages._stage.began -= 10.0
        return str(stages._stage)


def test_the_best_whole_candidate_and_the_time_left_are_shown() -> None:
    def trial(block: str, metric: float, seed: int) -> SearchTrial:
        return SearchTrial((block,), metric, seconds=30.0, seed=seed)

    text = shown([trial("0", 0.5, 0), trial("0", 0.7, 1), trial("1", 0.9, 0)], most=8, trainings_each=2)
    assert "best 0.6: block 0" in text  # block 1 has had one of its two trainings
    assert "3 of 8" in text
    assert "at most about 25 s left" in text  # two in ten seconds, five are left


def test_dry_run_and_json_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_recipe(tmp_path))
    capsys.readouterr()
    assert run(monkeypatch, "search", path, "--procedure", "prefix", "--dry-run") == 0
    said, progress = capsys.readouterr()
    assert "time a few steps" in progress and "time a few steps" not in said
    assert "prefix(): at most 3 trainings." in said and "With 1 job: at most about" in said and "Memory" in said
    assert run(monkeypatch, "search", path, "--json", "--output", str(tmp_path / "there")) == 0
    assert json.loads(capsys.readouterr().out)["cost"]["trainings"] == 4
    assert (tmp_path / "there" / "search" / "table.md").exists()


def test_what_is_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "search", str(write_recipe(tmp_path, pruner="MedienPruner"))) == 2
    said = capsys.readouterr().err
    assert "did you mean 'MedianPruner'" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rates": []}, r"rates: \[\]"),
        ({"rates": [0]}, "rates=0"),
        ({"rates": ["fast"]}, "'fast'"),
        ({"seeds": [-1]}, "-1 .*whole number"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": 3}, "seeds.*3.*list"),
        ({"seeds": [0.5]}, "0.5 .*whole number"),
        ({"divide": "attention"}, "divide.*'attention'.*list"),
        ({"folds": 1}, "folds=1 "),
        ({"folds": 3, "seeds": [0, 1]}, "seeds.*folds"),
        ({"pruner_options": {"percentile": 3}}, "need a pruner"),
    ],
)
def test_a_wrong_key_is_named_when_the_recipe_is_read(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_recipe(write_recipe(tmp_path, **keys))


def test_wrong_pruner_options(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, pruner="MedianPruner", pruner_options={"percent": 3}))
    with pytest.raises(SurgicalError, match="MedianPruner"):
        search(recipe, console=QUIET)
    with pytest.raises(SurgicalError, match="jobs=0"):
        search(recipe, jobs=0, console=QUIET)


def test_what_does_not_load_leaves_no_bar(tmp_path: Path) -> None:
    """The cursor of the terminal stayed hidden after the error."""
    write_data(tmp_path / "data")
    recipe = load_recipe(write_recipe(tmp_path))
    (tmp_path / "model" / "config.json").unlink()
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    with pytest.raises(SurgicalError, match="model"):
        search(recipe, console=terminal)
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1
