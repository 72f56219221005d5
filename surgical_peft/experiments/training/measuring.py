"""What a training is measured by: the task's metric on each split, further ones on test data, and source data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...scoring.progress import Counted, Stages
from ..recipe.recipe import Recipe
from ..tasks import Examples, Task, further_measure, spread
from ..tasks.unlabelled import images_of
from .report import FurtherMetric, SourceReport
from .source_data import SourceData


@dataclass(frozen=True)
class Measurement:
    """A metric on examples.

    Attributes:
        metric: its name, as the recipe has it.
        split: that the examples are of.
        measure: gives the metric of a model.
        examples: to measure on.
    """

    metric: str
    split: str
    measure: Callable[[nn.Module, Examples], float]
    examples: Examples

    def of(self, model: nn.Module, when: str, stages: Stages) -> float:
        """The metric of a model, told as a stage `when` (before, after) training."""
        stages.begin(f"measure {self.metric} {when} training, {self.split}", len(self.examples))
        return self.measure(model, Counted(self.examples, stages))


def measurements(recipe: Recipe, task: Task) -> tuple[list[Measurement], list[Measurement]]:
    """Those by the task's metric, on validation and test data, and those by the recipe's `test_metrics`.

    Raises:
        SurgicalError: as `further_measure`.
    """
    splits = [split for split in ("validation", "test") if split in task.splits]
    own = [Measurement(task.metric, split, task.measure, images_of(task.splits[split])) for split in splits]
    further = []
    for written, metric in zip(recipe.keys().get("test_metrics", {}), recipe.test_metrics, strict=True):
        split, measure, examples = further_measure(recipe, metric)
        further.append(Measurement(written, split, measure, spread(examples, recipe.test_metrics[metric])))
    return own, further


def source_measurements(recipe: Recipe) -> list[Measurement]:
    """The loss and the task's metric on the recipe's `source_data`; none where it has none.

    Raises:
        SurgicalError: as `SourceData`.
    """
    if recipe.source_data is None:
        return []
    source = SourceData(recipe)
    split = f"source {source.split}"
    return [
        Measurement("loss", split, source.loss, source.examples),
        Measurement(source.task.metric, split, source.metric, source.examples),
    ]


def further_report(
    entries: Sequence[Measurement], before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, FurtherMetric]:
    """What the recipe's `test_metrics` gave, for the report."""
    return {
        entry.metric: FurtherMetric(entry.split, len(entry.examples), before[entry.metric], after[entry.metric])
        for entry in entries
    }


def source_report(
    entries: Sequence[Measurement], before: Sequence[float], after: Sequence[float]
) -> SourceReport | None:
    """What `source_measurements` gave, for the report; None where there are none."""
    if not entries:
        return None
    loss, metric = entries
    return SourceReport(loss.split, len(loss.examples), metric.metric, *before, *after)
