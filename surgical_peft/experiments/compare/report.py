"""Report of a comparison, as it is written to `report.json` and read from there."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Difference:
    """Paired difference of a method's test results to those of full fine-tuning.

    Attributes:
        mean: over all trainings.
        interval: its 95 % confidence interval, low and high; None where the trainings do not tell one.
        interval_of_all: the same, widened for the number of methods compared (Bonferroni).
    """

    mean: float
    interval: list[float] | list[None]
    interval_of_all: list[float] | list[None]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval, or None."""
        return _bounds(self.interval)

    @property
    def wide_bounds(self) -> tuple[float, float] | None:
        """The widened interval, or None."""
        return _bounds(self.interval_of_all)


def _bounds(interval: list[float] | list[None]) -> tuple[float, float] | None:
    low, high = interval
    return None if low is None or high is None else (low, high)


@dataclass(frozen=True)
class MethodRow:
    """Row of a method. Lists have an entry for each training at the best rate; what is no finite number is None.

    Attributes:
        method: its title.
        rates: the mean of the validation metric at each rate that was tried.
        rate: the best one; None of a method that trains nothing.
        at_edge: whether that is the lowest or highest one tried.
        validation, test: the metric.
        forgotten: what is lost on the source model's own data; None where that was not asked for.
        blocks: that the method chose.
        tuned_parameters: how many.
        bytes: of the saved weights.
        peak_bytes: alive at once in a training step.
        ms, ms_ratio: time of a step, and as a part of that of full fine-tuning.
        seconds, choosing_seconds: means of a training and of the choice of its blocks.
        to_full: None of full fine-tuning itself, and of what diverged.
        grid: the rates that it began with, before more were added; empty in reports of earlier versions.
        test_metrics: of the test split, by each further metric that the recipe asks for.
        source_loss_rise: by how much the loss on the source model's own data has risen; None where that was not asked
            for, and in reports of earlier versions.
    """

    method: str
    rates: dict[str, float | None]
    rate: float | None
    at_edge: bool
    validation: list[float | None]
    test: list[float | None]
    forgotten: list[float | None] | None
    blocks: list[list[str]]
    tuned_parameters: list[int]
    bytes: list[int | None]
    peak_bytes: int | None
    ms: float | None
    ms_ratio: float | None
    seconds: float
    choosing_seconds: float
    to_full: Difference | None = None
    grid: list[float] = field(default_factory=list)
    test_metrics: dict[str, list[float | None]] = field(default_factory=dict)
    source_loss_rise: list[float | None] | None = None

    @property
    def is_rate_added(self) -> bool:
        """Whether the best rate is none of its grid, which was extended."""
        return bool(self.grid) and self.rate not in self.grid

    @property
    def has_diverged(self) -> bool:
        """Whether the method gave no number, at its best rate."""
        return None in self.test

    @property
    def results(self) -> list[float]:
        """The numbers in `test`: all, unless the method has diverged."""
        return [value for value in self.test if value is not None]

    @property
    def mean(self) -> float:
        """Mean of the test results of a method that has not diverged."""
        return statistics.fmean(self.results)


@dataclass(frozen=True)
class ComparisonReport:
    """What a comparison found.

    Attributes:
        date, versions, machine, seconds: when, with what and where it was made, and how long it took.
        recipe: its keys.
        metric: that was measured.
        sources: names of the source models.
        seeds: of the trainings.
        compared: how many methods have a difference to full fine-tuning at a rate.
        methods: a row each.
        interval: in words, what the intervals cover.
        sentences: what won, and whether that is more than noise.
        split: that results are told on, `test` or, where the data have none, `validation`.
    """

    date: str
    versions: dict[str, str]
    machine: str
    seconds: float
    recipe: dict[str, Any]
    metric: str
    sources: list[str]
    seeds: list[int]
    compared: int
    methods: list[MethodRow]
    interval: str = ""
    sentences: Sequence[str] = ()
    split: str = "test"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `report.json`; as in versions before, where results are told on test data."""
        values = {key: value for key, value in asdict(self).items() if (key, value) != ("split", "test")}
        rows = [
            {
                key: value
                for key, value in row.items()
                if value or key not in ("grid", "test_metrics", "source_loss_rise")
            }
            for row in values["methods"]
        ]
        return {**values, "methods": rows}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ComparisonReport:
        """The report that `to_json` gave."""
        rows = [
            MethodRow(**{**row, "to_full": None if row["to_full"] is None else Difference(**row["to_full"])})
            for row in data["methods"]
        ]
        return cls(**{**data, "methods": rows})
