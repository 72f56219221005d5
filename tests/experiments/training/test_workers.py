"""The pool of workers: results in order, no job after one that failed, a killed worker is told plainly."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from surgical_peft import SurgicalError
from surgical_peft.experiments.training.job_progress import report_progress
from surgical_peft.experiments.training.workers import WorkerPool, shared_threads
from surgical_peft.scoring import progress

_settings: list[str] = []


def set_up(setting: str) -> None:
    _settings[:] = [setting]


def tell(number: int) -> tuple[int, int, int, list[str]]:
    time.sleep(0.05 * (3 - number))  # the first ends last
    return number, os.getpid(), torch.get_num_threads(), list(_settings)


def fail(folder: Path, number: int) -> None:
    (folder / str(number)).touch()
    if number == 0:
        raise SurgicalError("the disk is full.")
    time.sleep(0.3)


class Log(io.StringIO):
    """Lets a job end once the time that is left was told."""

    go: Path | None = None

    def write(self, text: str) -> int:
        if self.go and " left" in text:
            self.go.touch()
        return super().write(text)


LOG = Log()


def half(go: Path) -> None:
    report_progress(0.5)
    deadline = time.monotonic() + 60
    while not go.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", params=[1, 2], ids="{} process".format)
def pool(request: pytest.FixtureRequest) -> Iterator[WorkerPool]:
    console = Console(file=LOG)
    with shared_threads(torch.get_num_threads()), WorkerPool(request.param, console, set_up, "mine") as pool:
        yield pool


def test_results_come_in_the_order_of_the_jobs(pool: WorkerPool) -> None:
    numbers, processes, threads, settings = zip(*pool.run("tell", tell, [(0,), (1,), (2,)]), strict=True)
    assert numbers == (0, 1, 2) and set(threads) == {1}
    is_here = set(processes) == {os.getpid()}
    assert is_here or os.getpid() not in processes
    assert all(found == ([] if is_here else ["mine"]) for found in settings)


def test_no_job_is_begun_after_one_that_failed(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="disk is full"):
        pool.run("fail", fail, [(tmp_path, number) for number in range(20)])
    assert len(list(tmp_path.iterdir())) < 20
    assert len(pool.run("tell", tell, [(1,)])) == 1  # and it works on


def test_the_time_left_is_told_before_the_first_job_is_done(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)
    monkeypatch.setattr(LOG, "go", tmp_path / "go")
    pool.run("train", half, [(tmp_path / "go",)] * 2)


def test_a_killed_worker_is_told() -> None:
    console = Console(file=io.StringIO())
    with WorkerPool(2, console) as pool, pytest.raises(SurgicalError, match="killed"):
        pool.run("kill", kill, [(0,)])
