"""The book of a search: an Optuna study that several workers share, on any machine, each of them killed at any time.

Workers claim trainings under the workers' common lock, see `storage.py`. The heartbeat is our own: Optuna's runs
only in `Study.optimize`, and not on a journal.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import optuna
import psutil
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ..atomic_files import all_finite
from ..errors import SurgicalError
from ..threads import in_background
from ..typed_json import JsonReader
from .result import SearchTrial, trial_of
from .storage import lock_and_storage, shown

_UNUSABLE = (OSError, ImportError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
_AT_WORK: set[str] = set()  # the searches that run in this process
_LAST_BEAT = 10.0  # seconds to wait for a sign of life that is just being written


@dataclass(frozen=True)
class Task:
    """One training that is to be done once."""

    blocks: tuple[str, ...]
    rate: float | None
    seed: int | None


class Study:
    """The trials of a search, as all its workers see them.

    Args:
        url: where it is kept, None for this process's memory.
        name: of the study.
        searched: what the search is, in plain data; another one under the same name is refused.
        dead_after: seconds without a sign of life after which a worker on another machine is taken for dead.
        pruner: says by what was reported whether a training is hopeless; None = never.

    Raises:
        SurgicalError: the storage cannot be used, or the study is one of another search.
    """

    def __init__(
        self,
        url: str | None,
        name: str,
        searched: dict[str, Any],
        dead_after: float,
        pruner: optuna.pruners.BasePruner | None = None,
    ) -> None:
        self._where = f"study {name!r} in {shown(url)}"
        self._lock, open_storage = lock_and_storage(url, name)
        self._beat_every = dead_after / 5 if url else None
        self._dead_after = dead_after
        process = psutil.Process()
        self._worker = {"machine": _machine(), "process": process.pid, "started": process.create_time()}
        self._worker["search"] = uuid.uuid4().hex
        self._beats: dict[int, tuple[int, float]] = {}
        with self._alone():
            self._storage = open_storage()
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
                pruner=pruner or optuna.pruners.NopPruner(),
            )
            self._check(searched)

    def __enter__(self) -> Study:
        _AT_WORK.add(self._worker["search"])
        return self

    def __exit__(self, *_: object) -> None:
        _AT_WORK.discard(self._worker["search"])

    def _check(self, searched: dict[str, Any]) -> None:
        known, searched = self._study.user_attrs, json.loads(json.dumps(searched))
        if self._study.direction != StudyDirection.MAXIMIZE or (not known and self._study.get_trials(deepcopy=False)):
            raise SurgicalError(f"the {self._where} was not made by run_search: give another name.")
        for key, value in searched.items():
            if key not in known:
                self._study.set_user_attr(key, value)
            elif known[key] != value:
                was, now = _differing(known[key], value)
                raise SurgicalError(
                    f"the {self._where} is a search with {key} {was!r}, and this one has {key} {now!r}: "
                    "give this one another name (name=...), or delete the study."
                )
        self._blocks = searched["blocks"]

    def take(self, tasks: Iterable[Task]) -> tuple[Task, FrozenTrial] | None:
        """The first of `tasks` that nobody has done or is doing, now this worker's own; None if there is none."""
        with self._alone():
            taken = self._trials()
            task = next((task for task in tasks if task not in taken), None)
            if task is None:
                return None
            chosen = {name: name in task.blocks for name in self._blocks}
            settings = {key: value for key, value in (("rate", task.rate), ("seed", task.seed)) if value is not None}
            fixed = {**chosen, **settings}
            choices = {**dict.fromkeys(chosen, (False, True)), **{key: self._choices(key) for key in settings}}
            self._study.add_trial(  # in one write: a kill leaves no trial of which it is not known whose it is
                optuna.create_trial(
                    state=TrialState.RUNNING,
                    params=fixed,
                    distributions={
                        key: optuna.distributions.CategoricalDistribution(values) for key, values in choices.items()
                    },
                    user_attrs={"blocks": list(task.blocks), **settings, "worker": self._worker},
                )
            )
            return task, self._study.get_trials(deepcopy=False)[-1]

    def _choices(self, setting: str) -> tuple[Any, ...]:
        return tuple(self._study.user_attrs[f"{setting}s"])

    def finish(self, trial: FrozenTrial, done: SearchTrial) -> bool:
        """Record the outcome; False if others took this worker for dead, did the training themselves, and it is void.

        Raises:
            SurgicalError: it cannot be written; the message holds the metric.
        """
        try:
            with self._alone():
                if not self._is_ours(trial):
                    return False
                handle = Trial(self._study, trial._trial_id)
                handle.set_user_attr("seconds", done.seconds)
                if done.notes:
                    handle.set_user_attr("notes", json.loads(json.dumps(done.notes, default=str)))
                if done.error is not None:
                    handle.set_user_attr("error", done.error)
                    state = TrialState.PRUNED if done.state == "pruned" else TrialState.FAIL
                    self._study.tell(trial.number, state=state)
                else:
                    self._study.tell(trial.number, done.metric)
                return True
        except SurgicalError as error:
            raise SurgicalError(f"{error} Lost: blocks {list(done.blocks)}, metric {done.metric}.") from error

    def report(self, trial: FrozenTrial, metric: float, step: int) -> None:
        """Record a metric on the way.

        Raises:
            optuna.TrialPruned: the training is hopeless.
        """
        with self._alone():
            handle = Trial(self._study, trial._trial_id)
            handle.report(metric, step)
            is_hopeless = handle.should_prune()
        if is_hopeless:
            raise optuna.TrialPruned(f"pruned at step {step}, with {metric:.4g}")

    def give_back(self, trial: FrozenTrial) -> None:
        """Let others do a training that was interrupted."""
        with self._alone():
            if self._is_ours(trial):
                self._abandon(trial, "interrupted")

    def finished(self) -> dict[Task, SearchTrial]:
        """All finished trainings; those of dead workers are freed on the way."""
        with self._alone():
            return {task: _read(trial) for task, trial in self._trials().items() if trial.state.is_finished()}

    @contextmanager
    def alive(self, trial: FrozenTrial) -> Iterator[None]:
        """Gives signs of life while the training runs."""
        if self._beat_every is None:
            yield
            return
        stop = threading.Event()
        over = in_background(self._beat, trial, stop)
        try:
            yield
        finally:
            stop.set()
            over.wait(_LAST_BEAT)

    def _beat(self, trial: FrozenTrial, stop: threading.Event) -> None:
        beat = 0
        while not stop.wait(self._beat_every):
            beat += 1
            with suppress(SurgicalError), self._alone():  # a missed beat is no harm: there are five to a death
                if self._is_ours(trial):
                    Trial(self._study, trial._trial_id).set_user_attr("beat", beat)
        self._storage.remove_session()

    def _trials(self) -> dict[Task, FrozenTrial]:
        """The trial of each task, running or finished; trials of dead workers are not among them."""
        trials: dict[Task, FrozenTrial] = {}
        for trial in self._study.get_trials(deepcopy=False):
            attributes = trial.user_attrs
            if "blocks" not in attributes:
                continue
            if trial.state == TrialState.RUNNING and (why := attributes.get("abandoned") or self._death_of(trial)):
                self._abandon(trial, why)
                continue
            if "abandoned" in attributes:
                continue
            done = _read(trial)
            trials.setdefault(Task(done.blocks, done.rate, done.seed), trial)
        return trials

    def _is_ours(self, trial: FrozenTrial) -> bool:
        current = self._study.get_trials(deepcopy=False)[trial.number]
        return current.state == TrialState.RUNNING and "abandoned" not in current.user_attrs

    def _abandon(self, trial: FrozenTrial, why: str) -> None:
        Trial(self._study, trial._trial_id).set_user_attr("abandoned", why)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def _death_of(self, trial: FrozenTrial) -> str | None:
        """Why the worker of a running trial is dead; None while it may live."""
        worker = trial.user_attrs["worker"]
        if worker["machine"] == self._worker["machine"]:
            if worker["process"] == self._worker["process"] and worker["search"] not in _AT_WORK:
                return "its search ended before it"
            return None if _runs(worker["process"], worker["started"]) else f"process {worker['process']} is gone"
        beat, now = trial.user_attrs.get("beat", 0), time.monotonic()
        last, since = self._beats.get(trial.number, (-1, now))
        if beat != last:  # told by our own clock: those of two machines may differ
            self._beats[trial.number] = beat, now
            return None
        return f"no sign of life from {worker['machine']}" if now - since > self._dead_after else None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with self._lock():
                yield
        except SurgicalError:
            raise
        except _UNUSABLE as error:  # of Optuna, too, where the study is damaged
            raise self._unusable(error) from error
        except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            raise self._unusable(error.__cause__ or error) from error

    def _unusable(self, error: BaseException) -> SurgicalError:
        reason = str(error).strip().partition("\n")[0]
        return SurgicalError(
            f"the {self._where} cannot be read or written: {type(error).__name__}: {reason}. See that the server runs "
            "and its driver is installed, or that the folder can be written to and the disk is not full; then run the "
            "same again: finished trials are kept. One that is damaged has to be deleted."
        )


def _read(trial: FrozenTrial) -> SearchTrial:
    failed = trial.state != TrialState.COMPLETE
    ended = "pruned" if trial.state == TrialState.PRUNED else "failed"
    known: dict[str, Any] = {
        key: trial.user_attrs[key] for key in ("blocks", "rate", "seed", "notes") if key in trial.user_attrs
    }
    known |= {"metric": None if failed else trial.value, "state": ended if failed else "complete"}
    known["notes"] = all_finite(known.get("notes", {}))  # a loss that diverged, say
    known["seconds"] = trial.user_attrs.get("seconds", 0.0)
    known["error"] = trial.user_attrs.get("error", "ended by hand") if failed else None
    return trial_of(known, JsonReader("the study", "delete it, or give another name (name=...)"))


def _differing(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two dictionaries what differs, of all else all."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one, other
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return {key: one.get(key) for key in keys}, {key: other.get(key) for key in keys}


def _machine() -> str:
    """This machine, and in a container this container: where a process number means one process."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    return platform.node()


def _runs(process: int, started: float) -> bool:
    try:
        running = psutil.Process(process)
        return abs(running.create_time() - started) < 10 and running.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
