"""Findings of the jobs of a comparison: a small file each, named by all that the finding depends on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...atomic_files import write_text
from ...errors import SurgicalError
from ...scoring.selection import Selection
from ...typed_json import read_json
from .comparison import Comparison, Job

_REMEDY = "delete it, and run the same command again: only this job is done again"
_AFTER_CHOICE = ("training", "test")  # jobs that need to know what the method chose


class Findings:
    """Files of a comparison: findings in `runs/`, and the weights of trainings in `weights/` until they are measured.

    Attributes:
        comparison: whose jobs they are of.
        folder: where they lie.
    """

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.comparison, self.folder = comparison, folder

    def load(self, job: Job) -> dict[str, Any]:
        """What a job found that was done.

        Raises:
            SurgicalError: its file is damaged.
        """
        finding = read_json(self.path(job), _REMEDY).get("found")
        if not isinstance(finding, dict):
            raise SurgicalError(f"{str(self.path(job))!r} holds no finding: {_REMEDY}.")
        return finding

    def save(self, job: Job, finding: dict[str, Any]) -> None:
        """Keep what a job found, with all that it depends on."""
        asked = self.comparison.asked(job, self._shared_blocks(job))
        write_text(self.path(job), json.dumps({"asked": asked, "found": finding}, indent=1) + "\n")

    def is_done(self, job: Job) -> bool:
        """Whether the finding of a job is there."""
        chooses = job.kind in _AFTER_CHOICE and self.comparison.methods[job.method].choose
        return (not chooses or self.path(choice_of(job)).exists()) and self.path(job).exists()

    def path(self, job: Job) -> Path:
        """File of a job's finding: the same one for trainings of methods that chose the same blocks."""
        return self.folder / "runs" / f"{self.comparison.name_of(job, self._shared_blocks(job))}.json"

    def weights(self, job: Job) -> Path:
        """Folder for the weights of a training."""
        return self.folder / "weights" / self.path(replace(job, kind="training")).stem

    def selection(self, job: Job) -> Selection:
        """The blocks that the method of a job has chosen; none where there is nothing to choose."""
        if self.comparison.methods[job.method].choose is None:
            return Selection(())
        return Selection(tuple(self.load(choice_of(job))["blocks"]))

    def _shared_blocks(self, job: Job) -> tuple[str, ...] | None:
        """The blocks that a training is known by; None if it is known by its method."""
        if job.kind not in _AFTER_CHOICE or not self.comparison.methods[job.method].is_its_blocks:
            return None
        return self.selection(job).blocks


def choice_of(job: Job) -> Job:
    """The job that chose the blocks of a training."""
    return replace(job, kind="choice", rate=None)
