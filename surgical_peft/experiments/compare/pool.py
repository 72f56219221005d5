"""Pool of processes that do the jobs of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..recipe.recipe import Recipe
from ..training.workers import WorkerPool
from .comparison import Comparison, Job
from .jobs import JobRunner

_runners: dict[Path, JobRunner] = {}  # of a worker process: the one of the last job, by its folder


def _set_up() -> None:
    """Begin a worker with all that this module imports, and no runner."""
    _runners.clear()


def _do(recipe: Recipe, folder: Path, made: Path | None, job: Job) -> None:
    if folder not in _runners:
        _runners.clear()
        _runners[folder] = JobRunner(Comparison(recipe), folder, made)
    _runners[folder].do(job)


class JobPool(WorkerPool):
    """Does jobs of one comparison or several, in this process or shared among workers that have a runner each."""

    def __init__(self, jobs: int, console: Console) -> None:
        super().__init__(jobs, console, _set_up)
        self._is_alone = jobs == 1

    def do(self, job_runner: JobRunner, title: str, jobs: Sequence[Job]) -> None:
        """Do the jobs that are not done; those with one source model and seed together, for they share much."""
        wanted: dict[Path, Job] = {}
        for job in jobs:
            if not job_runner.findings.is_done(job):
                wanted.setdefault(job_runner.findings.path(job), job)
        ordered = sorted(wanted.values(), key=lambda job: (job.source, job.seed))
        if ordered and self._is_alone:
            self.run(title, job_runner.do, [(job,) for job in ordered])
        elif ordered:
            recipe, folder, made = job_runner.comparison.recipe, job_runner.findings.folder, job_runner.data.made
            self.run(title, _do, [(recipe, folder, made, job) for job in ordered])
