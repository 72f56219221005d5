"""`surgical-peft search`: a recipe's search, by any number of processes, with its table and its picture."""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ... import procedures
from ...atomic_files import check_replaceable, whole_folder
from ...blocks.block_map import kind_of
from ...errors import SurgicalError
from ...rendering import markdown_row, progress_bar
from ...search.result import SearchResult, SearchTrial, candidate_of, state_of
from ...search.run import count_trainings, optuna_classes, run_search
from ...validation import resolve
from ..recipe.recipe import Recipe
from ..training.provenance import machine, today, versions
from ..training.train import score
from ..training.workers import SPAWN, shared_threads, start_worker
from .objective import RecipeObjective

_RESULT = "search.json"  # by which the result of an earlier search is known
_LAST_WORDS = 30.0  # seconds for the other workers to notice that all is done


@dataclass(frozen=True)
class CostEstimate:
    """The cost of a search.

    Attributes:
        procedure: in words.
        trainings: at most so many, see `count_trainings`; None if that is not known.
        seconds_each: of one training of all layers; few take longer. Estimated from a few steps.
        seconds: of the whole search with its jobs, at most about; None if that is not known.
    """

    procedure: str
    trainings: int | None
    seconds_each: float
    seconds: float | None


def plan(recipe: Recipe, jobs: int = 1) -> CostEstimate:
    """Estimate the cost of the search of a recipe; trains a few steps to tell the time, and keeps nothing.

    Raises:
        SurgicalError: as `search`.

    Example:
        >>> plan(load_recipe("recipes/sweep_noise.yaml"), jobs=2).trainings
        90
    """
    with shared_threads(jobs):
        recipe = _with_scores(recipe)
        objective = RecipeObjective(recipe)
        procedure = recipe.make_procedure()
        trainings = count_trainings(procedure, objective.blocks, rates=objective.rates, seeds=objective.seeds)
        seconds = objective.seconds()
    at_once = min(jobs, os.cpu_count() or 1)
    return CostEstimate(repr(procedure), trainings, seconds, trainings and math.ceil(trainings / at_once) * seconds)


def search(
    recipe: Recipe,
    output: str | Path | None = None,
    *,
    jobs: int = 1,
    storage: str | None = None,
    name: str | None = None,
    console: Console | None = None,
) -> SearchResult:
    """Search a recipe's blocks by its procedure; run the same again to resume.

    Args:
        recipe: its `procedure`, `rates`, `seeds` or `folds`, and `pruner` say how to search.
        output: folder to write to; default is the recipe's `output_dir`. It gets `study.db` and, once all is done,
            `search/` with `search.json`, `table.md` and `profile.png` (where blocks were tuned alone).
        jobs: processes that share the trainings, and the cores.
        storage: as for `run_search`; default is `study.db` in the folder.
        name: of the study; default is that of the procedure.
        console: where to show progress; default is the terminal.

    Raises:
        SurgicalError: as `run_search` and `RecipeObjective`; or the folder holds something else than a search.

    Example:
        >>> result = search(load_recipe("recipes/sweep_noise.yaml"), jobs=2)
        >>> config = SurgicalConfig.from_selection(result.best)
    """
    if jobs < 1:
        raise SurgicalError(f"jobs={jobs} is too few: 1 or more.")
    folder = Path(str(output or recipe.arguments().output_dir))
    check_replaceable(folder / "search", _RESULT)
    _quieten_optuna()
    with shared_threads(jobs):
        return _search(_with_scores(recipe), folder, jobs, storage, name, console or Console())


def _search(
    recipe: Recipe, folder: Path, jobs: int, storage: str | None, name: str | None, console: Console
) -> SearchResult:
    objective = RecipeObjective(recipe)
    kept: dict[str, Any] = {"storage": storage or f"sqlite:///{folder / 'study.db'}", "name": name or recipe.procedure}
    most = count_trainings(recipe.make_procedure(), objective.blocks, rates=objective.rates, seeds=objective.seeds)
    with (
        _Progress(console, most, len(objective.rates) * len(objective.seeds), jobs) as progress,
        _helpers(jobs - 1, recipe, kept, torch.get_num_threads()),
    ):
        result = _run(recipe, objective, kept, progress)
    with whole_folder(folder / "search", _RESULT) as temporary:
        result.save(temporary / _RESULT)
        (temporary / "table.md").write_text(search_markdown(result, objective.metric), encoding="utf-8")
        if any(math.isfinite(metric) for block, metric in result.profile.items() if kind_of(block) != "head"):
            result.plot(temporary / "profile.png", f"validation {objective.metric}")
    return result


def _run(recipe: Recipe, objective: RecipeObjective, kept: dict[str, Any], progress: Any = None) -> SearchResult:
    return run_search(
        recipe.make_procedure(),
        objective,
        rates=objective.rates,
        seeds=objective.seeds,
        pruner=recipe.make_pruner(),
        on_progress=progress,
        **kept,
    )


def _work(recipe: Recipe, kept: dict[str, Any], threads: int) -> None:
    """What another process does: the same search, silently."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but the one who started it ends it
    start_worker(threads, _quieten_optuna)
    try:
        _run(recipe, RecipeObjective(recipe), kept)
    except SurgicalError as error:
        sys.exit(f"a worker stopped: {error}")


@contextmanager
def _helpers(count: int, recipe: Recipe, kept: dict[str, Any], threads: int) -> Iterator[None]:
    """Other processes that work on the same study while this one does."""
    processes = [SPAWN.Process(target=_work, args=(recipe, kept, threads)) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        yield
        for process in processes:
            process.join(_LAST_WORDS)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _quieten_optuna() -> None:
    optuna_classes()  # says what to install
    from optuna import logging

    logging.set_verbosity(logging.WARNING)  # else a line for each study and trial, between those of the bar


def _with_scores(recipe: Recipe) -> Recipe:
    """The recipe with the scores that its procedure asks for, by the recipe's criterion."""
    wanted = inspect.signature(resolve(recipe.procedure, procedures)).parameters
    if "scores" not in wanted or "scores" in recipe.procedure_options:
        return recipe
    if recipe.divide:
        raise SurgicalError(
            f"{recipe.procedure} scores whole layers, and divide={recipe.divide} searches parts of them: leave one of "
            "the two out, or give procedure_options the scores of the parts."
        )
    scores = {block: float(f"{value:.6g}") for block, value in score(recipe).values.items()}
    return replace(recipe, procedure_options={**recipe.procedure_options, "scores": scores})


class _Progress:
    """A bar with the best candidate so far and the time left; called with the finished trials."""

    def __init__(self, console: Console, most: int | None, trainings_each: int, jobs: int) -> None:
        self._bar = progress_bar(console, "{task.fields[left]}")
        self._task = self._bar.add_task("search", total=most, left="")
        self._most, self._each, self._jobs = most, trainings_each, jobs

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, finished: Sequence[SearchTrial]) -> None:
        trials: dict[tuple[str, ...], list[SearchTrial]] = {}
        for trial in finished:
            trials.setdefault(trial.blocks, []).append(trial)
        whole = [candidate_of(done) for done in trials.values() if len(done) == self._each]
        best = max((one for one in whole if math.isfinite(one.metric)), key=lambda one: one.metric, default=None)
        text = "search" if best is None else f"best so far {best.metric:.4g}: {_short(best.blocks)}"
        left = ""
        if finished and self._most:
            seconds = sum(trial.seconds for trial in finished) / len(finished) / self._jobs
            left = f"at most about {timedelta(seconds=round(seconds * max(0, self._most - len(finished))))} left"
        self._bar.update(self._task, completed=len(finished), description=text, left=left)


def _short(blocks: tuple[str, ...]) -> str:
    return ", ".join(blocks) if len(blocks) < 5 else f"{blocks[0]}, {blocks[1]}, ... ({len(blocks)} blocks)"


def search_markdown(result: SearchResult, metric: str) -> str:
    """The candidates of a search as Markdown, the chosen one bold, with a line on what it cost."""
    lines = [
        markdown_row(["blocks", f"validation {metric}", "rate", "tuned parameters", "state"]),
        markdown_row(["---", *["---:"] * 3, "---"]),
    ]
    for candidate in result.candidates:
        trials = [trial for trial in result.trials if trial.blocks == candidate.blocks]
        spread = "" if candidate.deviation is None else f" ± {candidate.deviation:.4f}"
        cells = ["all" if candidate.blocks == result.blocks else ", ".join(candidate.blocks)]
        cells.append("-" if math.isnan(candidate.metric) else f"{candidate.metric:.4f}{spread}")
        if candidate.blocks == result.best.blocks:
            cells = [f"**{cell}**" for cell in cells]
        cells.append("-" if candidate.rate is None else f"{candidate.rate:g}")
        cells.append(f"{trials[0].notes['tuned_parameters']:,}" if "tuned_parameters" in trials[0].notes else "-")
        cells.append(state_of(trials))
        lines.append(markdown_row(cells))
    seeds = len({trial.seed for trial in result.trials})
    means = f"mean ± standard deviation of {seeds} trainings at the best rate" if seeds > 1 else "at the best rate"
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines += [
        "",
        f"`{result.procedure}`: {result.trainings} trainings; {means}. {today()}, {packages}; {machine()}.",
    ]
    return "\n".join(lines) + "\n"
