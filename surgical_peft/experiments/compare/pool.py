"""Who does the jobs of a comparison: this process, or several that share them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...errors import SurgicalError
from ...quiet import quieten
from ..recipe.recipe import Recipe
from .comparison import Comparison, Job
from .jobs import JobRunner

_OWN: list[JobRunner] = []  # of a worker process


def _start(recipe: Recipe, folder: Path, threads: int) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    quieten()
    _OWN[:] = [JobRunner(Comparison(recipe), folder)]


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(job: Job) -> None:
    _OWN[0].do(job)


class JobPool:
    """Does jobs, in this process or shared among several, and shows how far it is."""

    def __init__(self, job_runner: JobRunner, jobs: int, console: Console) -> None:
        self._job_runner, self._console = job_runner, console
        start = (job_runner.comparison.recipe, job_runner.folder, torch.get_num_threads())
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=start) if jobs > 1 else None

    def __enter__(self) -> JobPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def do(self, what: str, jobs: Sequence[Job]) -> None:
        """Do the jobs that are not done; those with one source model and seed together, for they share much."""
        wanted = [job for job in jobs if not self._job_runner.is_done(job)]
        left = list({self._job_runner.path(job): job for job in reversed(wanted)}.values())[
            ::-1
        ]  # the first of equals
        if not left:
            return
        left.sort(key=lambda job: (job.source, job.seed))
        columns = (TextColumn("{task.description:14}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task(what, total=len(left))
            for _ in self._done(left):
                bar.advance(task)

    def _done(self, jobs: Sequence[Job]) -> Iterator[None]:
        if self._pool is None:
            for job in jobs:
                self._job_runner.do(job)
                yield
            return
        futures = [self._pool.submit(_do, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                yield
        except BrokenProcessPool as error:
            raise SurgicalError(
                "a worker was killed, perhaps for want of memory; what is finished is kept: run the same again, with "
                "fewer --jobs."
            ) from error
        finally:
            for future in futures:
                future.cancel()
