"""Pool of processes that do the jobs of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..recipe.recipe import Recipe
from ..training.workers import WorkerPool
from .comparison import Comparison, Job
from .jobs import JobRunner

_runners: list[JobRunner] = []  # of a worker process


def _set_up(recipe: Recipe, folder: Path) -> None:
    _runners[:] = [JobRunner(Comparison(recipe), folder)]


def _do(job: Job) -> None:
    _runners[0].do(job)


class JobPool(WorkerPool):
    """Does jobs by a runner, in this process or shared among several that have a runner each."""

    def __init__(self, job_runner: JobRunner, jobs: int, console: Console) -> None:
        super().__init__(jobs, console, _set_up, job_runner.comparison.recipe, job_runner.findings.folder)
        self._findings = job_runner.findings
        self._function = job_runner.do if jobs == 1 else _do

    def do(self, title: str, jobs: Sequence[Job]) -> None:
        """Do the jobs that are not done; those with one source model and seed together, for they share much."""
        wanted: dict[Path, Job] = {}
        for job in jobs:
            if not self._findings.is_done(job):
                wanted.setdefault(self._findings.path(job), job)
        if wanted:
            ordered = sorted(wanted.values(), key=lambda job: (job.source, job.seed))
            self.run(title, self._function, [(job,) for job in ordered])
