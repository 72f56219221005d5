"""The report of a training: everything that a model card needs and that cannot be known later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...auto import MOST
from ...errors import SurgicalError
from ...typed_json import JsonReader, read_json, to_json
from .provenance import PACKAGES

REPORT = "report.json"
RANDOM_SHIFTS = ("corruption", "character_noise", "casing", "imbalance")
_JSON = JsonReader(REPORT, "train again")
_PLOT = re.compile(r"\w[\w.-]*\.png", re.ASCII)


@dataclass(frozen=True)
class BaseModelReport:
    """The base model of an adapter.

    Attributes:
        class_: of transformers.
        on_hub, commit: whether it is from the Hub, and which commit, if that is known.
        new_labels: number of labels of a new head.
        fingerprint: of the weights that were tuned, before tuning.
    """

    class_: str
    on_hub: bool
    commit: str | None
    new_labels: int | None
    fingerprint: str | None


@dataclass(frozen=True)
class DataReport:
    """The data of a training.

    Attributes:
        on_hub, commit, fingerprint: see `provenance.identity`.
        examples: number of each split.
        shift: the keys by which the recipe changes the data on purpose.
        labels: names of the model's labels, if it is a classifier.
        summary: what was understood of the data, in lines; reports of versions before do not have it.
    """

    on_hub: bool
    commit: str | None
    fingerprint: str | None
    examples: dict[str, int]
    shift: dict[str, Any]
    labels: list[str] | None
    summary: list[str] | None = None


@dataclass(frozen=True)
class RateReport:
    """Learning rates and steps of a training.

    Attributes:
        batch_size: examples in a step, of all processes together.
        policy, policy_options: as in the recipe.
    """

    learning_rate: float
    schedule: str
    weight_decay: float
    optimizer: str
    epochs: float
    steps: int
    batch_size: int
    seed: int
    policy: str | None
    policy_options: dict[str, Any]


@dataclass(frozen=True)
class FurtherMetric:
    """One of the recipe's `test_metrics`.

    Attributes:
        split: that it was measured on.
        examples: how many of it.
        before, after: the metric.
    """

    split: str
    examples: int
    before: float
    after: float


@dataclass(frozen=True)
class SourceReport:
    """The data of the source model's own task, before and after tuning.

    Attributes:
        split: that it was measured on, such as `source test`.
        examples: how many of it.
        metric: its name.
        loss_before, before, loss_after, after: the mean loss, and the metric.
    """

    split: str
    examples: int
    metric: str
    loss_before: float
    before: float
    loss_after: float
    after: float

    @property
    def rise(self) -> float:
        """The rise of the loss."""
        return self.loss_after - self.loss_before


@dataclass(frozen=True)
class TrainingReport:
    """A training: on what, how, and with which result; `report.json` holds it.

    Attributes:
        name, date, seconds: of the training, choosing and measuring included.
        task: its name.
        recipe: its keys.
        blocks, target_modules, modules_to_save, tuned_modules, selection: as in the adapter's config.
        tuned_parameters, all_parameters: how many.
        metric: its name.
        before, after: the metric on each split.
        base_model, dataset, rates: on what and how.
        versions: of the packages.
        adapter: its folder.
        scored: the blocks that were scored.
        plot: file with the plot of the scores.
        pipeline: the Hub's name for the task; reports of versions before do not have it.
        in_pipeline: whether `pipeline` takes the adapter's folder and model; versions before did not say.
        test_metrics: further metrics that the recipe asks for.
        source: what was measured on the recipe's `source_data`; None where it has none.
    """

    name: str
    date: str
    seconds: float
    task: str
    recipe: dict[str, Any]
    blocks: list[str] | None
    target_modules: Any
    modules_to_save: list[str] | None
    tuned_modules: list[str]
    selection: dict[str, Any] | None
    tuned_parameters: int
    all_parameters: int
    metric: str
    before: dict[str, float]
    after: dict[str, float]
    base_model: BaseModelReport
    dataset: DataReport
    rates: RateReport
    versions: dict[str, str]
    adapter: str
    scored: list[str] | None
    plot: str | None
    pipeline: str | None = None
    in_pipeline: bool = False
    test_metrics: dict[str, FurtherMetric] = field(default_factory=dict)
    source: SourceReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `report.json` holds it."""
        values = to_json(self)
        optional = (
            (values, "pipeline"),
            (values, "in_pipeline"),
            (values, "test_metrics"),
            (values, "source"),
            (values["dataset"], "summary"),
        )
        for part, key in optional:
            if not part[key]:  # reports of versions before do not have it
                del part[key]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingReport:
        """The report in a `report.json`.

        Raises:
            SurgicalError: something is missing, of a wrong type, or other than in the recipe; the message names it.
        """
        report = _JSON.read(cls, values)
        for key in ("model", "data"):
            _JSON.member(report.recipe, key, "recipe")
        for split in ("train", *report.splits):
            _JSON.member(report.dataset.examples, split, "dataset.examples")
        for split in report.splits:
            _JSON.member(report.before, split, "before")
            _JSON.member(report.after, split, "after")
        for package in PACKAGES:
            _JSON.member(report.versions, package, "versions")
        if report.plot is not None and not _PLOT.fullmatch(report.plot):
            _JSON.refuse("plot", report.plot, "a picture in the folder of the training, such as scores.png")
        report._check_shift()
        report._check_policy()
        if report.is_chosen:
            report._check_selection()
        return report

    @classmethod
    def load(cls, path: str | Path) -> TrainingReport:
        """The report in a file.

        Raises:
            SurgicalError: the file cannot be read, or as `from_json`.
        """
        return cls.from_json(read_json(path, _JSON.remedy))

    @property
    def splits(self) -> list[str]:
        """The splits that were measured, in their order."""
        return [split for split in {**self.before, **self.after, **self.dataset.examples} if split != "train"]

    @property
    def is_chosen(self) -> bool:
        """The blocks were chosen by scores, and not named in the recipe."""
        return self.recipe.get("blocks", "auto") == "auto"

    def _check_shift(self) -> None:
        shift, path = self.dataset.shift, "dataset.shift"
        for key in (*RANDOM_SHIFTS, "label_map"):
            if self.recipe.get(key):
                _check_same(f"{path}.{key}", _JSON.member(shift, key, path), self.recipe[key])
        needed = ["severity"] if "corruption" in shift else []
        needed += ["shift_seed"] if shift.keys() & set(RANDOM_SHIFTS) else []
        for key in needed:
            _JSON.read(int, _JSON.member(shift, key, path), f"{path}.{key}")

    def _check_policy(self) -> None:
        _check_same("rates.policy", self.rates.policy, self.recipe.get("policy"))
        if self.rates.policy is not None:
            _check_same("rates.policy_options", self.rates.policy_options, self.recipe.get("policy_options", {}))

    def _check_selection(self) -> None:
        """The record of a choice has all its numbers."""
        record = _JSON.read(dict[str, Any], self.selection, "selection")
        for kind, keys in ((str, ("rule", "criterion")), (int, ("k", "num_batches", "seed"))):
            for key in keys:
                _JSON.read(kind, _JSON.member(record, key, "selection"), f"selection.{key}")
        scores = _JSON.read(dict[str, float], _JSON.member(record, "scores", "selection"), "selection.scores")
        for block in _JSON.read(list[str], self.scored, "scored"):
            _JSON.member(scores, block, "selection.scores")
        if is_limited := "cost" in record:
            cost = _JSON.read(dict[str, Any], record["cost"], "selection.cost")
            for key in ("budget", "steps"):
                _JSON.read(float, _JSON.member(cost, key, "selection.cost"), f"selection.cost.{key}")
        _JSON.read(str, self.plot, "plot")
        # Without a number, the best were tried together, one more than was worth it, or as many as the budget allowed.
        if self.recipe.get("num_blocks") is None and (not is_limited or "joint_loss" in record):
            losses = _JSON.member(record, "joint_loss", "selection")
            losses = _JSON.read(dict[str, float], losses, "selection.joint_loss")
            tried = [] if is_limited else sorted(scores.keys() - record.get("refused", {}), key=lambda b: -scores[b])
            tried = tried[: min(int(record["k"]) + 1, MOST)]
            missing = [block for block in tried if block not in losses]
            # Of blocks with equal scores any may have been the last that was tried.
            for block in missing[len(losses.keys() - set(tried)) :] if missing else []:
                _JSON.member(losses, block, "selection.joint_loss")


def _check_same(path: str, reported: Any, given: Any) -> None:
    if reported != given:
        raise SurgicalError(f"{path} is {reported!r} in {REPORT}, and {given!r} in its recipe: train again.")
