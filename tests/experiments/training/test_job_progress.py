"""How much of a job is done: parts of parts, jobs that say nothing, and steps of a training in another process."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.training.job_progress import part_of_job, report_progress, telling
from surgical_peft.experiments.training.profiling import step_costs
from surgical_peft.experiments.training.runner import RecipeRunner
from tests.support.tiny import write_recipe


def told_by(*jobs: object) -> list[float]:
    """How much is done after each report."""
    total: list[float] = [0.0]
    for job in jobs:
        with telling(lambda share: total.append(total[-1] + share)):
            job()  # type: ignore[operator]
    return total


def test_a_job_that_says_nothing_is_done_at_its_end() -> None:
    report_progress(0.5)  # outside of a job nobody asks
    assert told_by(lambda: None, lambda: None) == [0, 1, 2]


def test_parts_of_parts() -> None:
    def job() -> None:
        with part_of_job(0.5, 1.0):
            report_progress(0.5)
            with part_of_job(0.5, 0.75):
                report_progress(0.5)
            report_progress(0.1)  # nothing is undone

    assert told_by(job) == pytest.approx([0, 0.75, 0.8125, 0.875, 1])


def test_a_job_that_fails_is_not_done() -> None:
    def job() -> None:
        report_progress(0.25)
        raise ValueError

    total: list[float] = []
    with pytest.raises(ValueError), telling(total.append):
        job()
    assert total == [0.25]
    report_progress(0.5)  # that job is over
    assert total == [0.25]


def test_the_steps_of_a_training_are_told(tmp_path: Path) -> None:
    runner = RecipeRunner(load_recipe(write_recipe(tmp_path)))
    total = told_by(lambda: runner.train(lambda model: model))
    assert len(total) == 1 + runner.steps() and total == sorted(total) and total[-1] == 1


def test_the_timing_of_steps_tells_of_each_training(tmp_path: Path) -> None:
    runner = RecipeRunner(load_recipe(write_recipe(tmp_path)))
    trainings = {
        name: lambda watch: runner.train(lambda model: model, watch=watch, max_steps=2) for name in ("full", "head")
    }
    total = told_by(lambda: step_costs(trainings, planned_steps=1))
    assert total == pytest.approx([0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 1])
