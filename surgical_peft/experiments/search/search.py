"""`surgical-peft search`: a recipe's search, by any number of processes, with its table and its picture."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ... import procedures
from ...atomic_files import check_replaceable, whole_folder
from ...blocks.block_map import blocks_in_words, kind_of
from ...errors import SurgicalError
from ...rendering import clock, markdown_code, markdown_row, markdown_text
from ...scoring.progress import Stages
from ...search.proposals import count_trainings, planned_candidates
from ...search.result import (
    SOURCE_LOSS_RISE,
    SearchResult,
    SearchTrial,
    candidate_of,
    source_loss_of,
    state_of,
)
from ...search.run import optuna_classes, run_search
from ..recipe.code import resolve_key
from ..recipe.recipe import Recipe
from ..training.cost import Timing, depth_of, memory_in_words, shared, time_in_words, timed_at_once
from ..training.provenance import machine, today, versions
from ..training.questions import noise
from ..training.train import score
from ..training.workers import SPAWN, deaf_to_interrupts, shared_threads, start_worker
from .objective import RecipeObjective

_RESULT = "search.json"  # by which the result of an earlier search is known
_LAST_WORDS = 30.0  # seconds for the other workers to notice that all is done


@dataclass(frozen=True)
class CostEstimate:
    """The cost of a search.

    Attributes:
        procedure: in words.
        trainings: at most so many, see `count_trainings`; None if that is not known.
        seconds_each: of one training of all layers; few take longer. Estimated from a few steps, taken in as many
            processes at once as will share the search.
        seconds: of the whole search with its jobs, about, if it takes that many trainings; None if that is not known.
        memory: bytes that a process takes at most.
        jobs: processes.
    """

    procedure: str
    trainings: int | None
    seconds_each: float
    seconds: float | None
    memory: int
    jobs: int

    def lines(self) -> list[str]:
        """The estimate in words."""
        most = "how many trainings is not known" if self.trainings is None else f"at most {self.trainings} trainings"
        lines = [
            f"{self.procedure}: {most}.",
            f"One training of all layers: about {clock(self.seconds_each)}; of later ones less.",
        ]
        lines += [time_in_words(self.seconds, self.jobs, is_bound=True)] if self.seconds is not None else []
        return [*lines, memory_in_words(self.memory, self.jobs)]


def plan(recipe: Recipe, jobs: int = 1, *, console: Console | None = None) -> CostEstimate:
    """Estimate the cost of the search of a recipe; trains a few steps to tell the time, and keeps nothing.

    Raises:
        SurgicalError: as `search`.

    Example:
        >>> plan(load_recipe("recipes/sweep_noise.yaml"), jobs=2).trainings
        90
    """
    with Stages(console) as stages:
        stages.begin("load model and data")
        recipe = _with_scores(recipe)
        objective = RecipeObjective(recipe)
    procedure, blocks = recipe.make_procedure(), objective.blocks
    times = len(objective.rates) * len(objective.seeds)
    candidates = planned_candidates(procedure, blocks, times=times)
    timing = timed_at_once(jobs, stages.console, *((objective.timing,) if jobs == 1 else (_timing, recipe)))
    if candidates is None:
        return CostEstimate(repr(procedure), None, timing.whole, None, timing.memory, jobs)
    each = [timing.seconds(depth_of(candidate, blocks.names, blocks.layers)) for candidate in candidates]
    seconds = timing.start + shared(times * sum(each), jobs, longest=max(each, default=0.0))
    return CostEstimate(repr(procedure), times * len(candidates), timing.whole, seconds, timing.memory, jobs)


def _timing(recipe: Recipe) -> Timing:
    return RecipeObjective(recipe).timing()


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
    recipe.check_run(output)
    folder = Path(str(output or recipe.arguments().output_dir))
    check_replaceable(folder / "search", _RESULT)
    _quieten_optuna()
    with shared_threads(jobs):
        return _search(_with_scores(recipe, console), folder, jobs, storage, name, console or Console())


def _search(
    recipe: Recipe, folder: Path, jobs: int, storage: str | None, name: str | None, console: Console
) -> SearchResult:
    kept: dict[str, Any] = {"storage": storage or f"sqlite:///{folder / 'study.db'}", "name": name or recipe.procedure}
    with Stages(console) as stages:
        stages.begin("load model and data")
        objective = RecipeObjective(recipe)
        stages.end()
        objective.summary.show(console)
        most = count_trainings(recipe.make_procedure(), objective.blocks, rates=objective.rates, seeds=objective.seeds)
        with _helpers(jobs - 1, recipe, kept, torch.get_num_threads()):
            progress = _Progress(stages, most, len(objective.rates) * len(objective.seeds))
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
        with deaf_to_interrupts():
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


def _with_scores(recipe: Recipe, console: Console | None = None) -> Recipe:
    """The recipe with the scores that its procedure asks for, by the recipe's criterion."""
    wanted = inspect.signature(resolve_key(recipe, "procedure", procedures)).parameters
    if "scores" not in wanted or "scores" in recipe.procedure_options:
        return recipe
    if recipe.divide:
        raise SurgicalError(
            f"{recipe.procedure} scores whole layers, and divide={recipe.divide} searches parts of them: leave one of "
            "the two out, or give procedure_options the scores of the parts."
        )
    scores = {block: float(f"{value:.6g}") for block, value in score(recipe, console).values.items()}
    return replace(recipe, procedure_options={**recipe.procedure_options, "scores": scores})


class _Progress:
    """The stage of a search, with the best candidate so far; called with the finished trials."""

    def __init__(self, stages: Stages, most: int | None, trainings_each: int) -> None:
        self._stages, self._most, self._each = stages, most, trainings_each
        self._is_begun = False

    def __call__(self, finished: Sequence[SearchTrial]) -> None:
        if not self._is_begun:
            self._is_begun = True
            if finished:
                self._stages.say(f"goes on: {len(finished)} trainings are done")
            self._stages.begin("search, trainings", self._most, done=len(finished), is_bound=True)
        trials: dict[tuple[str, ...], list[SearchTrial]] = {}
        for trial in finished:
            trials.setdefault(trial.blocks, []).append(trial)
        whole = [candidate_of(done) for done in trials.values() if len(done) == self._each]
        best = max((one for one in whole if math.isfinite(one.metric)), key=lambda one: one.metric, default=None)
        self._stages.reach(len(finished))
        if best is not None:
            self._stages.note(f"best {best.metric:.4g}: {_short(best.blocks)}")


def _short(blocks: tuple[str, ...]) -> str:
    return blocks_in_words(blocks) if len(blocks) < 3 else f"{blocks[0]}, {blocks[1]}, ... ({len(blocks)} blocks)"


def search_markdown(result: SearchResult, metric: str) -> str:
    """The candidates of a search as Markdown, the chosen one bold, with a line on what it cost."""
    has_source = any(SOURCE_LOSS_RISE in trial.notes for trial in result.trials)
    header = ["blocks", f"validation {markdown_text(metric)}", "rate", "tuned parameters"]
    header += [*["source loss"] * has_source, "state"]
    lines = [markdown_row(header), markdown_row(["---", *["---:"] * (len(header) - 2), "---"])]
    for candidate in result.candidates:
        trials = [trial for trial in result.trials if trial.blocks == candidate.blocks]
        spread = "" if candidate.deviation is None else f" ± {candidate.deviation:.4f}"
        cells = ["all" if candidate.blocks == result.blocks else markdown_text(", ".join(candidate.blocks))]
        cells.append("-" if math.isnan(candidate.metric) else f"{candidate.metric:.4f}{spread}")
        if candidate.blocks == result.best.blocks:
            cells = [f"**{cell}**" for cell in cells]
        cells.append("-" if candidate.rate is None else f"{candidate.rate:g}")
        cells.append(f"{trials[0].notes['tuned_parameters']:,}" if "tuned_parameters" in trials[0].notes else "-")
        cells += [source_loss_of(candidate, trials)] * has_source
        cells.append(state_of(trials))
        lines.append(markdown_row(cells))
    seeds = len({trial.seed for trial in result.trials})
    means = f"mean ± standard deviation of {seeds} trainings at the best rate" if seeds > 1 else "at the best rate"
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines += [
        "",
        f"{markdown_code(result.procedure)}: {result.trainings} trainings; {means}. "
        + "Source loss: its rise on the source model's own data. " * has_source
        + f"{today()}, {packages}; {machine()}.",
    ]
    return "\n".join(lines) + "\n"


def noise_of(result: SearchResult) -> list[str]:
    """How sure the best accuracy is, in words; nothing where something else was measured."""
    notes = result.trials[0].notes.get("validation", {}) if result.trials else {}
    if notes.get("metric") != "accuracy" or not math.isfinite(result.metric):
        return []
    return [noise(result.metric, notes["examples"], "validation")]
