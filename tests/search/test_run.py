"""The search loop: what it gives, that it resumes, that workers share it, and that a kill costs nothing but time.

The objectives here look their metric up in a table. Workers are forked from this warm process: importing torch takes
longer than a whole search.
"""

from __future__ import annotations

import _thread
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState

from surgical_peft import BlockMap, Selection, SurgicalConfig, SurgicalError, procedures, run_search
from surgical_peft.search import study as studies
from surgical_peft.search.result import SearchResult, SearchTrial, candidate_of
from tests.support.played import BLOCKS, LAYERS

FILES = {"sqlite": "sqlite:///{}/study.db", "journal": "journal:///{}/study.log"}
SWEEP = procedures.sweep()  # 12 layers alone, all, head: 14 trainings
FORK = multiprocessing.get_context("fork")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def metric_of(blocks: tuple[str, ...]) -> float:
    """The table: any metric will do, as long as no two candidates share it."""
    return random.Random(" ".join(blocks)).random()


class Objective:
    """Looks the metric up and writes a line for each start; may sleep, and stop at a given call."""

    blocks = BLOCKS

    def __init__(self, folder: Path, seconds: float = 0.0, stop_at: int | None = None) -> None:
        self.log, self.seconds, self.stop_at, self.calls = folder / "starts", seconds, stop_at, 0

    def __call__(self, selection: Selection) -> float:
        with self.log.open("a") as file:
            file.write(" ".join(selection.blocks) + "\n")
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        self.calls += 1
        time.sleep(self.seconds)
        return metric_of(selection.blocks)

    @property
    def starts(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture(params=list(FILES))
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return FILES[request.param].format(tmp_path)


@pytest.fixture
def journal(tmp_path: Path) -> str:
    """For what does not depend on the kind of storage: making the tables of SQLite takes half a second."""
    return FILES["journal"].format(tmp_path)


def load(storage: str, name: str = "search") -> optuna.Study:
    """The study as Optuna itself opens it, without us."""
    if storage.startswith("journal"):
        return optuna.load_study(
            study_name=name, storage=JournalStorage(JournalFileBackend(storage.removeprefix("journal:///")))
        )
    return optuna.load_study(study_name=name, storage=storage)


def complete(storage: str, name: str = "search") -> list[tuple[str, ...]]:
    trials = load(storage, name).get_trials(states=[TrialState.COMPLETE])
    return [tuple(trial.user_attrs["blocks"]) for trial in trials]


def start(work: Callable[[], Any], result: Path | None = None) -> Any:
    """Do `work` in a forked process; a search result goes to a file."""

    def body() -> None:
        done = work()
        if result:
            done.save(result)
        os._exit(0)  # no tidying up of what the parent owns

    process = FORK.Process(target=body, daemon=True)
    process.start()
    return process


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


# --- what it gives


def test_the_best_candidate_wins_and_the_record_says_how(tmp_path: Path) -> None:
    result = run_search(SWEEP, Objective(tmp_path))
    expected = [*((name,) for name in LAYERS), BLOCKS.names, ("head",)]
    assert [trial.blocks for trial in result.trials] == expected
    assert [trial.metric for trial in result.trials] == [metric_of(blocks) for blocks in expected]
    assert {trial.state for trial in result.trials} == {"complete"}
    best = max(expected, key=metric_of)
    assert result.best == Selection(best)
    assert result.metric == result.best.record["metric"] == metric_of(best)
    assert result.best.record["procedure"] == result.procedure == "sweep()"
    assert result.profile == {name: metric_of((name,)) for name in (*LAYERS, "head")}
    assert result.deviations == {}
    assert result.trainings == 14
    assert result.seconds == pytest.approx(sum(trial.seconds for trial in result.trials))
    assert SurgicalConfig.from_selection(result.best).blocks == list(best)


def test_the_same_as_a_search_by_hand() -> None:
    def more_is_better(selection: Selection) -> float:
        return len(selection.blocks) + metric_of(selection.blocks)

    result = run_search(procedures.greedy_forward(num_blocks=3), more_is_better, blocks=BLOCKS)
    chosen: tuple[str, ...] = ()
    for _ in range(3):
        grown = [BLOCKS.parse([*chosen, name]) for name in LAYERS if name not in chosen]
        chosen = max(grown, key=metric_of)
    assert result.best.blocks == chosen
    assert result.trainings == 12 + 11 + 10


def two_ways(blocks: BlockMap) -> Iterator[Any]:
    metric = yield ("0",)
    assert metric == 1.0
    metrics = yield [("2", "1"), [3, "embeddings"], ("0",)]  # any order, indices too; a known candidate costs nothing
    assert metrics == [1.0, 0.5, 1.0]


def test_a_generator_of_the_users_own() -> None:
    told = {("0",): 1.0, ("1", "2"): 1.0, ("embeddings", "3"): 0.5}
    result = run_search(two_ways, lambda selection: told[selection.blocks], blocks=BLOCKS)
    assert [trial.blocks for trial in result.trials] == [("0",), ("1", "2"), ("embeddings", "3")]
    assert result.best.blocks == ("0",)  # of equals the first


def choosing(blocks: BlockMap) -> Any:
    yield [("0",), ("1",)]
    return ("1",)


def test_what_a_procedure_returns_is_chosen() -> None:
    metrics = {("0",): 0.9, ("1",): 0.8}
    result = run_search(choosing, lambda selection: metrics[selection.blocks], blocks=BLOCKS)
    assert (result.best.blocks, result.metric) == (("1",), 0.8)


def test_rates_and_seeds(tmp_path: Path) -> None:
    table = {0.1: {1: 0.2, 2: 0.4}, 0.2: {1: 0.5, 2: 0.7}, 0.3: {1: 0.9, 2: math.nan}}
    storage = FILES["journal"].format(tmp_path)
    calls = []

    def objective(selection: Selection, rate: float, seed: int) -> float:
        calls.append((rate, seed))
        selection.record["parameters"] = 12
        return table[rate][seed] - (selection.blocks == ("1",))

    settings: dict[str, Any] = {"blocks": BLOCKS, "storage": storage, "rates": [0.1, 0.2, 0.3], "seeds": [1, 2]}
    result = run_search(procedures.sweep([0, 1]), objective, **settings)
    assert calls[:6] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2), (0.3, 1), (0.3, 2)]
    assert len(calls) == result.trainings == 4 * 6  # 0, 1, all, head
    first = result.candidates[0]
    assert (first.metric, first.rate) == (pytest.approx(0.6), 0.2)  # one of 0.3's trainings failed
    assert first.deviation == pytest.approx(math.sqrt(2) * 0.1)
    assert result.deviations["0"] == first.deviation
    assert result.profile["1"] == pytest.approx(-0.4)
    assert result.best.record["rate"] == 0.2
    assert {trial.notes["parameters"] for trial in result.trials} == {12}
    assert run_search(procedures.sweep([0, 1]), objective, **settings).to_json() == result.to_json()
    assert len(calls) == 24
    assert load(storage).trials[1].params["seed"] == 2


def test_means_and_rates_by_hand() -> None:
    def trials(*metrics: tuple[float | None, float]) -> list[SearchTrial]:
        return [SearchTrial(("0",), metric, 1.0, rate=rate) for rate, metric in metrics]

    assert candidate_of(trials((None, 0.25))).metric == 0.25
    assert candidate_of(trials((1, 0.5), (2, 0.5))).rate == 1  # of equals the first
    assert candidate_of(trials((1, math.nan), (2, 0.5))).rate == 2
    assert math.isnan(candidate_of(trials((1, math.nan), (1, 0.5))).metric)


# --- resuming


def test_a_finished_search_trains_nothing_again(journal: str, tmp_path: Path) -> None:
    first, again = Objective(tmp_path), Objective(tmp_path, stop_at=0)
    result = run_search(SWEEP, first, storage=journal)
    assert run_search(SWEEP, again, storage=journal) == result
    assert len(first.starts) == 14


def stop_after_every_trial(procedure: Any, storage: str, folder: Path) -> None:
    whole = run_search(procedure, Objective(folder))
    (folder / "starts").unlink()
    for k in range(whole.trainings):  # each run does one training and is stopped in the next
        assert not k or len(complete(storage)) == k - 1
        with pytest.raises(KeyboardInterrupt):
            run_search(procedure, Objective(folder, stop_at=1 if k else 0), storage=storage)
    last = Objective(folder)
    assert run_search(procedure, last, storage=storage) == whole
    assert Counter(complete(storage)) == Counter(trial.blocks for trial in whole.trials)
    assert len(last.starts) == 2 * whole.trainings  # those that were interrupted, and those that were not


def test_stopped_after_every_trial_it_resumes_to_the_same(storage: str, tmp_path: Path) -> None:
    stop_after_every_trial(SWEEP, storage, tmp_path)


def test_stopped_between_the_rounds_too(journal: str, tmp_path: Path) -> None:
    procedure = procedures.greedy_forward(num_blocks=2, epsilon=0, candidates="0:4")
    stop_after_every_trial(procedure, journal, tmp_path)


# --- many workers


def test_three_workers_share_the_trainings(storage: str, tmp_path: Path) -> None:
    alone = run_search(SWEEP, Objective(tmp_path))
    (tmp_path / "starts").unlink()
    results = [tmp_path / f"{number}.json" for number in range(3)]
    workers = [start(lambda: run_search(SWEEP, Objective(tmp_path, 0.05), storage=storage), path) for path in results]
    for worker in workers:
        worker.join(60)
    assert [SearchResult.load(path) for path in results] == [alone] * 3
    assert Counter(Objective(tmp_path).starts) == Counter(" ".join(trial.blocks) for trial in alone.trials)
    assert Counter(complete(storage)) == Counter(trial.blocks for trial in alone.trials)
    ran = {trial.user_attrs["worker"]["process"] for trial in load(storage).trials}
    assert len(ran) > 1


def kill_and_restart(storage: str, folder: Path, workers: int, kills: int, dice: random.Random) -> int:
    """A search whose workers are killed at random moments and replaced; gives the number of kills before it was done.

    Checks that the search ends as an undisturbed one does.
    """
    whole = run_search(SWEEP, Objective(folder))
    objective = Objective(folder, 0.05 if workers == 1 else 0.3)
    objective.log.unlink()
    out = folder / "result.json"

    def worker() -> Any:
        return start(lambda: run_search(SWEEP, objective, storage=storage), out)

    alive, killed = [worker() for _ in range(workers)], 0
    while killed < kills and not out.exists():
        if (
            dice.random() < 0.5
        ):  # else it is mostly killed while it opens the study, which takes longer than a training
            seen = len(objective.starts)
            wait_for(lambda seen=seen: len(objective.starts) > seen or out.exists())
        time.sleep(dice.uniform(0, 0.1))
        victim = dice.randrange(workers)
        if alive[victim].is_alive():
            os.kill(alive[victim].pid, signal.SIGKILL)
            killed += 1
        alive[victim].join()
        alive[victim] = worker()
    for each in alive:
        each.join(60)
        assert each.exitcode == 0
    assert SearchResult.load(out) == whole
    assert Counter(complete(storage)) == Counter(trial.blocks for trial in whole.trials)
    if killed:
        assert len(objective.starts) <= 14 + killed
    return killed


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", list(FILES))
def test_kill_9_at_random_moments(kind: str, workers: int, tmp_path: Path) -> None:
    dice, killed, searches = random.Random(workers), 0, 0
    while killed < 20:  # on a fast machine a search may end before it was killed 20 times: then another one
        searches += 1
        folder = tmp_path / f"{searches}"
        folder.mkdir()
        killed += kill_and_restart(FILES[kind].format(folder), folder, workers, 20 - killed, dice)
    print(f"{kind}, {workers} workers: {killed} kills in {searches} searches")


def elsewhere(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], result: Path | None = None) -> Any:
    """Do `work` in a process that takes itself for one of another machine."""
    with monkeypatch.context() as patch:
        patch.setattr(studies, "_machine", lambda: "elsewhere")
        return start(work, result)


def test_a_thread_that_never_begins_is_not_waited_for(
    journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short a thread may end before it runs, and `Thread.start` waits for it for ever."""
    monkeypatch.setattr(studies, "_LAST_BEAT", 0.01, raising=False)
    for module, name in ((_thread, "start_new_thread"), (threading, "_start_new_thread")):
        monkeypatch.setattr(module, name, lambda *_: 0, raising=False)
    worker = start(lambda: run_search(SWEEP, Objective(tmp_path), storage=journal), tmp_path / "result.json")
    worker.join(20)
    worker.kill()
    assert SearchResult.load(tmp_path / "result.json").trainings == 14


def test_where_no_thread_can_start_the_search_ends_and_nothing_is_lost(
    journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, pytest.raises(SurgicalError, match="thread"):
        patch.setattr(_thread, "start_new_thread", full)
        patch.setattr(threading, "_start_new_thread", full, raising=False)
        run_search(SWEEP, Objective(tmp_path), storage=journal)
    assert run_search(SWEEP, Objective(tmp_path), storage=journal).trainings == 14


def test_a_silent_worker_of_another_machine_is_replaced_after_a_while(
    journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Objective(tmp_path, 60)
    worker = elsewhere(monkeypatch, lambda: run_search(SWEEP, objective, storage=journal))
    wait_for(lambda: objective.log.exists())
    worker.kill()
    worker.join()
    result = run_search(SWEEP, Objective(tmp_path), storage=journal, dead_after=0.3)
    assert Counter(complete(journal)) == Counter(trial.blocks for trial in result.trials)
    lost = load(journal).get_trials(states=[TrialState.FAIL])
    assert [trial.user_attrs["abandoned"] for trial in lost] == ["no sign of life from elsewhere"]


def test_a_worker_that_gives_signs_of_life_is_waited_for(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    procedure, out, slow = procedures.sweep("0:1"), tmp_path / "out.json", Objective(tmp_path, 3)
    worker = elsewhere(monkeypatch, lambda: run_search(procedure, slow, storage=storage, dead_after=0.5), out)
    wait_for(lambda: slow.log.exists())
    result = run_search(procedure, Objective(tmp_path), storage=storage, dead_after=2)
    worker.join(60)
    assert SearchResult.load(out) == result
    assert len(slow.starts) == 3  # layer 0, all, head: each once
    assert len(load(storage).trials) == 3


def test_the_late_result_of_a_worker_taken_for_dead_is_void(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    slow = Objective(tmp_path, 0.2)
    worker = elsewhere(monkeypatch, lambda: run_search(SWEEP, slow, storage=storage, dead_after=50), out)
    wait_for(lambda: slow.log.exists())
    os.kill(worker.pid, signal.SIGSTOP)  # as a machine does that is put to sleep
    result = run_search(SWEEP, Objective(tmp_path), storage=storage, dead_after=0.3)
    os.kill(worker.pid, signal.SIGCONT)
    worker.join(60)
    assert SearchResult.load(out) == result
    assert Counter(complete(storage)) == Counter(trial.blocks for trial in result.trials)
    assert len(slow.starts) == 15


def test_a_search_that_broke_off_in_this_process_is_taken_up_in_it(
    journal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(studies.Study, "give_back", lambda self, trial: None)  # interrupted once more
        run_search(SWEEP, Objective(tmp_path, stop_at=3), storage=journal)
    assert run_search(SWEEP, Objective(tmp_path), storage=journal).trainings == 14


# --- PostgreSQL


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of our own on a port of the loopback."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed: no initdb")
    if find_spec("psycopg") is None:
        pytest.skip("no driver for PostgreSQL: psycopg is not installed")
    folder = Path("/tmp") / f"surgical_peft_{os.getpid()}"  # pytest's own folders are closed to other users
    folder.mkdir()
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        shutil.chown(folder, "postgres")
        user = {"user": "postgres"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **user}
    subprocess.run([initdb, "-D", folder / "data", "-U", "tester", "-A", "trust", "--no-sync"], **quiet)
    control = [str(Path(initdb).with_name("pg_ctl")), "-D", folder / "data", "-w"]
    options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
    subprocess.run([*control, "-o", options, "-l", folder / "log", "start"], **quiet)
    try:
        yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet)
        shutil.rmtree(folder)


def test_postgresql_workers_killed_at_random(postgresql: str, tmp_path: Path) -> None:
    whole = run_search(SWEEP, Objective(tmp_path))
    killed = kill_and_restart(postgresql, tmp_path, 3, 6, random.Random(0))
    print(f"PostgreSQL, 3 workers: {killed} kills")
    again = Objective(tmp_path, stop_at=0)
    assert run_search(SWEEP, again, storage=postgresql) == whole
    with pytest.raises(SurgicalError, match=r"sweep\(\).*prefix\(\)"):
        run_search(procedures.prefix(), again, storage=postgresql)


# --- the study as others see it


def test_the_study_is_readable_without_us(storage: str, tmp_path: Path) -> None:
    result = run_search(SWEEP, Objective(tmp_path), storage=storage)
    study = load(storage)
    searched = {"procedure": "sweep()", "blocks": list(BLOCKS.names), "rates": [], "seeds": []}
    assert study.user_attrs == {**searched, "pruner": None, "training": None}
    assert study.best_value == result.metric
    assert study.best_trial.params == {name: name in result.best.blocks for name in BLOCKS.names}
    assert study.best_trial.user_attrs["blocks"] == list(result.best.blocks)
    assert study.best_trial.user_attrs["seconds"] >= 0


def test_another_search_under_the_same_name_is_refused(journal: str, tmp_path: Path) -> None:
    run_search(SWEEP, Objective(tmp_path), storage=journal)
    other = Objective(tmp_path, stop_at=0)
    with pytest.raises(SurgicalError, match=r"procedure 'sweep\(\)'.*procedure 'prefix\(\)'.*another name"):
        run_search(procedures.prefix(), other, storage=journal)
    fewer = BlockMap(names=("0", "1"), modules={}, stacks={"": ("0", "1")}, tied={}, model_name="Toy")
    with pytest.raises(SurgicalError, match=r"blocks \['embeddings'.*blocks \['0', '1'\]"):
        run_search(SWEEP, other, blocks=fewer, storage=journal)
    with pytest.raises(SurgicalError, match=r"seeds \[\].*seeds \[1, 2\]"):
        run_search(SWEEP, other, seeds=[1, 2], storage=journal)
    assert (
        run_search(two_ways, lambda selection: 1.0 - ("3" in selection.blocks) / 2, **beside(journal)).trainings == 3
    )


def beside(storage: str) -> dict[str, Any]:
    return {"blocks": BLOCKS, "storage": storage, "name": "beside"}


def test_a_study_of_the_users_own_is_refused(tmp_path: Path) -> None:
    storage = FILES["sqlite"].format(tmp_path)
    study = optuna.create_study(storage=storage, study_name="search", direction="maximize")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    optuna.create_study(storage=storage, study_name="down")
    for name in ("search", "down"):
        with pytest.raises(SurgicalError, match=f"'{name}'.*run_search"):
            run_search(SWEEP, Objective(tmp_path), storage=storage, name=name)


# --- failures


def test_numbers_that_json_does_not_have_are_noted_as_none(storage: str) -> None:
    """A loss that diverged stood in the notes, and the study could not be read any more."""

    def objective(selection: Selection) -> float:
        selection.record["losses"] = [1.0, math.nan, -math.inf]
        return 0.5

    procedure = procedures.sweep("0:2")
    result = run_search(procedure, objective, blocks=BLOCKS, storage=storage)
    again = run_search(procedure, objective, blocks=BLOCKS, storage=storage)
    for trial in (*result.trials, *again.trials, *SearchResult.from_json(result.to_json()).trials):
        assert trial.notes["losses"] == [1.0, None, None]


def test_a_failed_trial_is_kept_and_never_wins(storage: str) -> None:
    calls = []

    def objective(selection: Selection) -> float:
        calls.append(selection.blocks)
        match selection.blocks:
            case ("0",):
                raise RuntimeError("a shape that does not fit")
            case ("1",):
                return math.nan
            case ("2",):
                return None  # type: ignore[return-value]
            case ("3",):
                return math.inf
        return 0.5

    procedure = procedures.sweep("0:5")
    result = run_search(procedure, objective, blocks=BLOCKS, storage=storage)
    assert result.best.blocks == ("4",)
    assert [trial.state for trial in result.trials] == ["failed"] * 4 + ["complete"] * 3
    assert all(math.isnan(trial.metric) for trial in result.trials[:4])
    errors = [trial.error or "" for trial in result.trials[:4]]
    assert errors[0] == "RuntimeError: a shape that does not fit"
    assert "nan" in errors[1] and "NoneType" in errors[2] and "inf" in errors[3]
    assert result.trials[4].error is None
    assert [trial.state for trial in load(storage).trials] == [TrialState.FAIL] * 4 + [TrialState.COMPLETE] * 3
    assert load(storage).trials[0].user_attrs["error"] == errors[0]
    again = run_search(procedure, objective, blocks=BLOCKS, storage=storage)
    assert again.to_json() == result.to_json()
    assert len(calls) == 7


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "fault",
    [
        FileNotFoundError("a temporary folder is gone"),
        ConnectionError("the Hub does not answer"),
        MemoryError(),
        torch.OutOfMemoryError("of a GPU"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        caused(RuntimeError("could not read the batch"), OSError("Input/output error")),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        RuntimeError("can't start new thread"),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_passing_fault_ends_the_search_and_is_no_result(fault: Exception, journal: str) -> None:
    """It was kept as a failed training: another candidate won, for good."""
    faults = [fault]

    def objective(selection: Selection) -> float:
        if selection.blocks == ("2",) and faults:
            raise faults.pop()
        return float(selection.blocks == ("2",))

    procedure = procedures.sweep("0:5")
    with pytest.raises(SurgicalError, match="'2'"):
        run_search(procedure, objective, blocks=BLOCKS, storage=journal)
    result = run_search(procedure, objective, blocks=BLOCKS, storage=journal)
    assert result.best.blocks == ("2",) and {trial.state for trial in result.trials} == {"complete"}


def test_no_metric_anywhere_is_an_error_and_the_trials_are_kept(journal: str) -> None:
    def objective(selection: Selection) -> float:
        raise RuntimeError("no validation examples")

    with pytest.raises(SurgicalError, match=r"14 of 14 .*\['0'\].*RuntimeError: no validation examples"):
        run_search(SWEEP, objective, blocks=BLOCKS, storage=journal)
    assert len(load(journal).trials) == 14


def test_a_chosen_candidate_that_failed_is_an_error() -> None:
    with pytest.raises(SurgicalError, match="1 of 2 trainings failed"):
        run_search(choosing, lambda selection: 1.0 if selection.blocks == ("0",) else math.nan, blocks=BLOCKS)


def nothing(blocks: BlockMap) -> Iterator[Any]:
    yield from ()


def empty_round(blocks: BlockMap) -> Iterator[Any]:
    yield ("0",)
    yield []


def empty_candidate(blocks: BlockMap) -> Iterator[Any]:
    yield ("0",)
    yield [("1",), ()]


def unknown(blocks: BlockMap) -> Iterator[Any]:
    yield ("0",)
    yield [("99",)]


def a_word(blocks: BlockMap) -> Iterator[Any]:
    yield ("0",)
    yield "11"


def a_number(blocks: BlockMap) -> Iterator[Any]:
    yield ("0",)
    yield 11


def endless(blocks: BlockMap) -> Iterator[Any]:
    while True:
        yield ("0",)


def chooses_another(blocks: BlockMap) -> Any:
    yield ("0",)
    return ("1",)


@pytest.mark.parametrize(
    ("procedure", "message"),
    [
        (nothing, "nothing.*ended"),
        (empty_round, r"empty_round.*proposed \[\], nothing"),
        (empty_candidate, "empty_candidate.*no block"),
        (unknown, r"unknown.*\[\('99',\)\]"),
        (a_word, "a_word.*'11'.*tuple"),
        (a_number, "a_number.*11.*tuple"),
        (endless, "endless.*25 trainings.*max_trials"),
        (chooses_another, r"chooses_another.*\('1',\)"),
    ],
)
def test_a_procedure_that_errs_is_named_and_its_trials_are_kept(
    procedure: Any, message: str, journal: str, tmp_path: Path
) -> None:
    with pytest.raises(SurgicalError, match=f"procedure .*{message}"):
        run_search(procedure, Objective(tmp_path), storage=journal, max_trials=25)
    assert complete(journal) == ([] if procedure is nothing else [("0",)])


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    objective = Objective(tmp_path)
    with pytest.raises(SurgicalError, match=r"blocks=BlockMap.find\(model\)"):
        run_search(SWEEP, metric_of)
    with pytest.raises(SurgicalError, match="with its brackets"):
        run_search(procedures.sweep, objective)
    with pytest.raises(SurgicalError, match=r"rates=\[0.1, 0.1\] .*twice"):
        run_search(SWEEP, objective, rates=[0.1, 0.1])
    with pytest.raises(SurgicalError, match="dead_after=0 "):
        run_search(SWEEP, objective, dead_after=0)


@pytest.mark.parametrize("storage", ["mysql://me:secret@host/db", "study.db", "sqlite:///:memory:", "journal:///"])
def test_a_storage_of_another_kind_is_refused(storage: str, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=r"'sqlite:///.*'journal:///.*'postgresql") as caught:
        run_search(SWEEP, Objective(tmp_path), storage=storage)
    assert "secret" not in str(caught.value)


def test_an_unreachable_storage_is_named_with_cause_and_cure(storage: str, tmp_path: Path) -> None:
    Path(storage.split("///")[1]).mkdir()  # a folder where the file should be
    with pytest.raises(SurgicalError, match=r"'search'.*cannot be read or written"):
        run_search(SWEEP, Objective(tmp_path), storage=storage)


def test_a_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/db"  # port 1: nobody listens; without a driver it fails earlier
    with pytest.raises(SurgicalError, match=r"me:\*\*\*@127.0.0.1:1/db.*driver") as caught:
        run_search(SWEEP, Objective(tmp_path), storage=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("rest", ["s3cret@host:port/db", "s3@cret@host/db", "s3/cret@host/db", "s3:cret@host:x/db"])
@pytest.mark.parametrize("kind", ["postgresql+psycopg", "mysql"])
def test_a_url_that_is_read_otherwise_than_meant_is_named_without_its_password(
    kind: str, rest: str, tmp_path: Path
) -> None:
    with pytest.raises(SurgicalError) as caught:
        run_search(SWEEP, Objective(tmp_path), storage=f"{kind}://me:{rest}")
    assert "me:***@" in str(caught.value) and "cret" not in str(caught.value) and "s3" not in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://me:secret@host:port/db", "postgresql://me:secret@[::1/db"])
def test_a_storage_whose_port_is_no_number(url: str, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=r"me:\*\*\*@") as caught:
        run_search(SWEEP, Objective(tmp_path), storage=url)
    assert "secret" not in str(caught.value)


def test_a_named_pipe_in_the_place_of_a_study_is_not_waited_for(storage: str, tmp_path: Path) -> None:
    os.mkfifo(storage.split("///")[1])
    with pytest.raises(SurgicalError, match="no file"):
        run_search(SWEEP, Objective(tmp_path), storage=storage)


@pytest.mark.parametrize("line", ["5", "null", '{"op_code": ""}', '{"op_code": 4}', "x"])
def test_a_damaged_line_of_a_journal_is_an_error_that_names_the_study(line: str, journal: str, tmp_path: Path) -> None:
    run_search(SWEEP, Objective(tmp_path), storage=journal)
    with (tmp_path / "study.log").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SurgicalError, match="'search'"):
        run_search(SWEEP, Objective(tmp_path), storage=journal)


def test_an_unfinished_last_line_of_a_journal_is_cut_off(tmp_path: Path) -> None:
    storage = FILES["journal"].format(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_search(SWEEP, Objective(tmp_path, stop_at=5), storage=storage)
    with (tmp_path / "study.log").open("a") as file:
        file.write('{"op_code":4,"worker_id":"x","study')
    assert run_search(SWEEP, Objective(tmp_path), storage=storage).trainings == 14
    assert len(Objective(tmp_path).starts) == 15
    assert run_search(SWEEP, Objective(tmp_path, stop_at=0), storage=storage).trainings == 14


def test_a_full_disk_keeps_what_is_finished(storage: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    run_search(two_ways, lambda selection: 1.0 - ("3" in selection.blocks) / 2, **beside(storage))  # the tables
    path = Path(storage.split("///")[1])
    room = path.stat().st_size + (12_000 if storage.startswith("sqlite") else 6_000)

    def work() -> None:
        random.random = lambda: 0.0  # Optuna tries five times, and sleeps up to 2 s in between
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            run_search(SWEEP, Objective(tmp_path), storage=storage)
        except SurgicalError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            said.write_text(str(error))

    start(work).join(60)
    assert "cannot be read or written" in said.read_text() and "disk" in said.read_text()
    kept = len(complete(storage))
    assert 0 < kept < 14
    before = len(Objective(tmp_path).starts)
    result = run_search(SWEEP, Objective(tmp_path), storage=storage)
    assert result == run_search(SWEEP, Objective(tmp_path))
    assert len(complete(storage)) == 14
    assert before < 14


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "surgical_peft.search.study")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SurgicalError, match=r"optuna.*'surgical-peft\[search\]'"):
        run_search(SWEEP, Objective(tmp_path))


# --- the result


@pytest.fixture
def result(tmp_path: Path) -> SearchResult:
    def objective(selection: Selection, seed: int) -> float:
        if selection.blocks == ("3",):
            raise RuntimeError("no")
        return metric_of(selection.blocks) + seed / 10

    return run_search(SWEEP, objective, blocks=BLOCKS, seeds=[0, 1])


def test_through_json_and_back(result: SearchResult, tmp_path: Path) -> None:
    text = result.to_json()
    again = SearchResult.from_json(text)
    assert again.to_json() == text
    assert again.best.record == result.best.record
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["cost"]["trainings"] == 28
    assert data["profile"]["3"] is None
    assert data["profile"]["0"] == pytest.approx(metric_of(("0",)) + 0.05)
    result.save(tmp_path / "deep" / "result.json")
    assert SearchResult.load(tmp_path / "deep" / "result.json").to_json() == text
    for wrong in ("{}", "[1]", "no"):
        with pytest.raises(SurgicalError, match="the JSON of a search result"):
            SearchResult.from_json(wrong)
    for key, wrong in {"metric": "0.5", "blocks": "0", "trials": [5], "best": {}, "procedure": 5}.items():
        with pytest.raises(SurgicalError, match=key if key != "best" else "blocks"):
            SearchResult.from_json(json.dumps({**data, key: wrong}))
    for wrong in ({"blocks": []}, {"blocks": ["99"]}, {"blocks": "11"}):
        with pytest.raises(SurgicalError, match="blocks"):
            SearchResult.from_json(json.dumps({**data, "best": {**data["best"], **wrong}}))


def test_the_table_marks_the_chosen_one(result: SearchResult) -> None:
    lines = str(result).splitlines()
    assert "sweep(): 28 trainings" in lines[0]
    marked = [line for line in lines[1:] if " *" in line]
    assert len(marked) == 1
    assert ("all" if result.best.blocks == BLOCKS.names else result.best.blocks[0]) in marked[0]
    assert [line for line in lines if "2 of 2 failed" in line]
    assert f"{result.metric:.4g} ± 0.071" in marked[0]


def test_the_plot_shows_bars_error_bars_and_both_lines(
    result: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path)))
    result.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list(LAYERS)
    bars = [bar for bar in axes.patches if not bar.get_hatch()]
    tops = {LAYERS[round(bar.get_x() + bar.get_width() / 2)]: bar.get_y() + bar.get_height() for bar in bars}
    assert tops == pytest.approx({name: result.profile[name] for name in LAYERS if name != "3"})
    assert sum(isinstance(part, ErrorbarContainer) for part in axes.containers) == 11
    labels = [text.get_text().split()[0] for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["all", "head", "no"]  # the last of what has no metric
    assert "2 of 2 failed" in [text.get_text() for text in axes.texts]


def test_without_a_block_alone_there_is_no_profile(tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match=r"profile|no block alone"):
        whole = run_search(procedures.prefix(), Objective(tmp_path))
        SearchResult(whole.best, whole.metric, whole.trials[:1], whole.blocks, whole.procedure).plot(
            tmp_path / "p.png"
        )
