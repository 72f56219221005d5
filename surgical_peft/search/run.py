"""The search loop: a procedure proposes candidates, workers that share a study train them, the best is the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..blocks.block_map import BlockMap
from ..errors import SurgicalError
from ..procedures.procedure import Procedure, as_procedure
from ..scoring.selection import Selection
from .attempt import attempt
from .proposals import candidates_in, endless, title_of
from .result import Candidate, SearchResult, SearchTrial, candidate_of

if TYPE_CHECKING:
    from .study import Study, Task

_log = logging.getLogger(__name__)
_LONGEST_WAIT = 2.0  # seconds between two looks at what the other workers do


def run_search(
    procedure: Procedure | Callable[..., Any] | str,
    objective: Callable[..., float],
    *,
    blocks: BlockMap | None = None,
    storage: str | None = None,
    name: str = "search",
    rates: Sequence[float] = (),
    seeds: Sequence[int] = (),
    pruner: Any = None,
    max_trials: int = 10_000,
    dead_after: float = 300.0,
    on_progress: Callable[[Sequence[SearchTrial]], None] | None = None,
) -> SearchResult:
    """Train the candidates that a procedure proposes and give the best one; run the same again to resume.

    Each training is a trial of an Optuna study. Finished trials are never done again: they are read from the study and
    fed to the procedure, which is how a search resumes after a kill. Run the same call in several processes, on any
    machines that reach the storage, and they share the trainings of each round; each of them returns the same result.
    A training of a killed worker is done by another one: at once on the same machine, after `dead_after` on another.

    Args:
        procedure: one of `surgical_peft.procedures`, your own generator function, or a name; see
            `procedures.procedure.Procedure`. What it returns is chosen, with None the candidate with the best metric.
        objective: trains a `Selection` and gives its validation metric, larger = better; called as
            `objective(selection)`, or with `rate=...` and `seed=...` where the search has them. What it writes into
            `selection.record` (tuned parameters, peak memory) is kept with the trial. If it raises, or its metric is
            not a finite number, the trial has failed, and stays so when the search is resumed; a lack of memory or an
            `OSError` ends the search instead, and the training is done when it is resumed. Its attribute `settings`,
            if it has one, says in plain data what a training is: a study holds trainings of one kind. Another,
            `measured`, says by name what else it writes down, and of what: a study begun without it goes on.
        blocks: the map of the model; without it, `objective.blocks`.
        storage: `"sqlite:///run/study.db"`, `"journal:///run/study.log"` (for a folder that several machines share),
            or `"postgresql+psycopg://user@host/database"`; None keeps the study in memory, for this call only. Three
            slashes and a path: relative to the working directory; four: absolute.
        name: of the study: a storage holds many.
        rates: learning rates; every candidate is trained with each, and its metric is that of its best.
        seeds: every candidate is trained with each, and its metric is their mean; folds of the data serve as well.
        pruner: one of `optuna.pruners`; stops trainings that look hopeless. The objective is called with `report=...`
            too, and calls `report(metric, step)` as it goes along; that ends the training if the pruner says so. Such
            a trial has no metric and never wins. The risk: a candidate that learns late is lost, the more so with few
            finished trials to compare with; and since the pruner judges by what is finished at that moment, several
            workers, or a search that was stopped and resumed, may prune otherwise and choose otherwise.
        max_trials: the most trainings; a procedure that wants more is taken for one that never ends.
        dead_after: seconds without a sign of life after which a worker on another machine is taken for dead.
        on_progress: called with all finished trials, of all workers, whenever this worker looks at the study.

    Raises:
        SurgicalError: no map of blocks; a candidate that is empty or unknown; a procedure that never ends; a storage
            that cannot be used, or whose study is another search; no training gave a metric. Finished trials are kept.

    Example:
        >>> result = run_search(procedures.sweep(), objective, storage="sqlite:///run/study.db")
        >>> config = SurgicalConfig.from_selection(result.best)
    """
    _check(rates, seeds, dead_after)
    blocks = blocks or getattr(objective, "blocks", None)
    if blocks is None:
        raise SurgicalError("what is searched is not known: give blocks=BlockMap.find(model), or objective.blocks.")
    study_class, task_class = optuna_classes()
    procedure = as_procedure(procedure)
    title = title_of(procedure)
    searched: dict[str, Any] = {"procedure": title, "blocks": list(blocks.names)}
    searched |= {"rates": list(rates), "seeds": list(seeds)}
    searched |= {"pruner": pruner and type(pruner).__name__, "training": getattr(objective, "settings", None)}
    searched |= getattr(objective, "measured", {})
    searched |= {"layers": list(blocks.layer_paths)} if blocks.layer_paths else {}
    origin = Selection((), {"procedure": title}, blocks.layer_paths)
    settings: list[tuple[float | None, int | None]] = [
        (rate, seed) for rate in (rates or (None,)) for seed in (seeds or (None,))
    ]
    trials: dict[tuple[str, ...], list[SearchTrial]] = {}
    proposals, answer, proposed = procedure(blocks), None, 0
    with study_class(storage, name, searched, dead_after, pruner) as study:
        while True:
            try:
                proposal = proposals.send(answer)
            except StopIteration as end:
                return _result(trials, end.value, blocks, title)
            single, candidates = candidates_in(proposal, blocks, title)
            proposed += len(candidates) * len(settings)
            if proposed > max_trials:
                raise endless(title, max_trials)
            new = [candidate for candidate in candidates if candidate not in trials]
            tasks = {candidate: [task_class(candidate, *pair) for pair in settings] for candidate in new}
            wanted = [task for group in tasks.values() for task in group]
            done = _train(study, wanted, objective, origin, pruner is not None, on_progress)
            trials |= {candidate: [done[task] for task in group] for candidate, group in tasks.items()}
            metrics = [candidate_of(trials[candidate]).metric for candidate in candidates]
            answer = metrics[0] if single else metrics


def _train(
    study: Study,
    tasks: list[Task],
    objective: Callable[..., float],
    origin: Selection,
    prunes: bool,
    on_progress: Callable[[Sequence[SearchTrial]], None] | None,
) -> dict[Task, SearchTrial]:
    """Have all tasks done, by this worker or by others, and give their trials."""
    wait = 0.02
    while True:
        if on_progress is not None:
            on_progress(list(study.finished().values()))
        if taken := study.take(tasks):
            task, trial = taken
            try:
                with study.alive(trial):
                    done = attempt(task, objective, origin, partial(study.report, trial) if prunes else None)
            except BaseException:
                study.give_back(trial)
                raise
            if not study.finish(trial, done):
                _log.warning("blocks %s: others took this worker for dead and did the training", list(task.blocks))
            wait = 0.02
            continue
        finished = study.finished()
        if all(task in finished for task in tasks):
            return finished
        time.sleep(wait)
        wait = min(1.5 * wait, _LONGEST_WAIT)


def _result(
    trials: dict[tuple[str, ...], list[SearchTrial]], chosen: Any, blocks: BlockMap, title: str
) -> SearchResult:
    """The candidate that the procedure chose, or the best of all; of equals the first."""
    candidates = {names: candidate_of(group) for names, group in trials.items()}
    every = tuple(trial for group in trials.values() for trial in group)
    if not every:
        raise SurgicalError(f"procedure {title} ended without a proposal for blocks {', '.join(blocks.names)}.")
    best: Candidate | None
    if chosen is None:
        whole = [candidate for candidate in candidates.values() if not math.isnan(candidate.metric)]
        best = max(whole, key=lambda candidate: candidate.metric, default=None)
    else:
        best = candidates.get(blocks.parse(chosen))
        if best is None:
            raise SurgicalError(f"procedure {title} chose {chosen!r}, which it had not proposed.")
    if best is None or math.isnan(best.metric):
        failed = [trial for trial in every if trial.error]
        raise SurgicalError(
            f"{title} ends without a candidate that has a metric: {len(failed)} of {len(every)} trainings failed or "
            f"were pruned, the first, blocks {list(failed[0].blocks)}, with: {failed[0].error}. Fix the objective and "
            "search under another name (name=...): failed trials are kept too."
        )
    record = {"procedure": title, "metric": best.metric, "candidates": len(candidates), "trainings": len(every)}
    if best.rate is not None:
        record["rate"] = best.rate
    return SearchResult(Selection(best.blocks, record, blocks.layer_paths), best.metric, every, blocks.names, title)


def _check(rates: Sequence[float], seeds: Sequence[int], dead_after: float) -> None:
    for key, given in (("rates", rates), ("seeds", seeds)):
        if len(set(given)) != len(given):
            raise SurgicalError(f"{key}={list(given)} has an entry twice: name it once.")
    if not dead_after > 0:
        raise SurgicalError(f"dead_after={dead_after} is not a number of seconds above 0.")


def optuna_classes() -> tuple[type[Study], type[Task]]:
    """The classes that store a search; imported when needed, since Optuna is an extra.

    Raises:
        SurgicalError: the extra is not installed.
    """
    try:
        from .study import Study, Task
    except ModuleNotFoundError as error:
        raise SurgicalError(f"run_search needs {error.name}: pip install 'surgical-peft[search]'.") from error
    return Study, Task
