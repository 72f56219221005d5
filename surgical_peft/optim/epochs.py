"""Counts epochs by the passes of the training loop, in the record that is saved with the optimizer."""

from __future__ import annotations

from typing import Any


class Epochs:
    """Tracks the epoch of a training, as `epoch`, `epoch_began` and `epoch_steps` of a record.

    Each pass over the data is an epoch, however long it is, but the one in which a run was interrupted: resumed, it
    goes on. Trainer begins a stream anew if it resumes beyond its first pass. The passes before then say when an epoch
    ends, so that the schedule is that of a run without an interruption.

    Example:
        >>> epochs, record = Epochs(resumed=False), {"epoch": None}
        >>> epochs.begin(record, step=0, length=4)
        >>> record["epoch"]
        0
    """

    def __init__(self, resumed: bool) -> None:
        self._resumed = resumed  # and no pass has begun yet
        self._steps: int | None = None  # of an epoch, where passes do not tell

    def begin(self, record: dict[str, Any], step: int, length: int | None) -> None:
        """A pass begins after `step` steps of the loop; an epoch has `length` of them, None if nobody knows."""
        if record["epoch"] is None:
            record["epoch"], done = divmod(step, length) if length else (0, 0)
            record["epoch_began"] = step - done
        elif self._resumed:
            known = length or record.get("epoch_steps")
            began = record.get("epoch_began", record["epoch"] * (known or 0))  # older checkpoints do not have it
            record["epoch_began"] = min(began, step)
            self._steps = known
            self.catch_up(record, step)
            self._steps = None if length else known
        elif self._steps is None:
            record["epoch_steps"] = step - record["epoch_began"]
            record["epoch"] += 1
            record["epoch_began"] = step
        self._resumed = False

    def catch_up(self, record: dict[str, Any], step: int) -> bool:
        """Count the epochs that have ended without a pass, after `step` steps of the loop; whether there are any."""
        before = record["epoch"]
        while self._steps and step - record["epoch_began"] >= self._steps:
            record["epoch"] += 1
            record["epoch_began"] += self._steps
        return bool(record["epoch"] != before)
