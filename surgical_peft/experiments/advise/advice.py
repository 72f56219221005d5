"""Advice as data: what `advice.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...typed_json import JsonReader, to_json

_JSON = JsonReader("advice.json", "ask for the advice again")


@dataclass(frozen=True)
class Difference:
    """A paired difference to the best candidate; the error is None where it is no finite number."""

    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class ProbeReport:
    """A short training.

    Attributes:
        rate: its learning rate; None where nothing was trained.
        share: of the recipe's steps.
        metric: on the validation examples; None for what is no finite number.
        seconds: that it took.
        source_loss_rise: of the loss on source data; None for what is no finite number, or was not measured.
    """

    rate: float | None
    share: float
    metric: float | None
    seconds: float
    source_loss_rise: float | None = None


@dataclass(frozen=True)
class CandidateReport:
    """A candidate: how it was trained, and where it stands.

    Attributes:
        method, title: its name in a recipe, and in words.
        surgery: whether it chooses blocks.
        same_as: the candidate that tunes the same blocks and was trained in its place.
        blocks, tuned_parameters: what it tunes.
        probes: its short trainings.
        rate: the best, and `at_edge`: whether that is the lowest or the highest that was tried.
        validation: its metric, if it was trained longest, or not at all.
        to_best: its difference to the best of these; None for the best one and for those that are none.
        source_loss_rise: of the loss on source data, after the training at that rate; None as in its probes.
        forgets_more: whether it was trained longest, and that is more than it may.
    """

    method: str
    title: str
    surgery: bool
    same_as: str | None
    blocks: list[str]
    tuned_parameters: int
    probes: list[ProbeReport]
    rate: float | None
    at_edge: bool
    validation: float | None
    to_best: Difference | None
    source_loss_rise: float | None = None
    forgets_more: bool = False


@dataclass(frozen=True)
class Recommendation:
    """The recommended candidate; `lines` are what to write into the recipe."""

    method: str
    title: str
    blocks: list[str]
    tuned_parameters: int
    all_parameters: int
    lines: dict[str, Any]


@dataclass(frozen=True)
class ConstantReport:
    """The best that the same answer for every validation example gives: its name, and the metric."""

    answer: str
    metric: float


@dataclass(frozen=True)
class ScoreReport:
    """The scores of the blocks by a criterion."""

    criterion: str
    values: dict[str, float]


@dataclass(frozen=True)
class SignatureReport:
    """A `Signature`, with what follows from it."""

    gradients: dict[str, float]
    loss: float
    source_loss: float | None
    moved: dict[str, float] | None
    floor: dict[str, float] | None
    moving: list[str]
    kind: str | None


@dataclass(frozen=True)
class Trained:
    """One of the longest trainings: its candidate in words, and what it reached."""

    title: str
    rate: float | None
    metric: float | None
    source_loss_rise: float | None


@dataclass(frozen=True)
class ForgettingReport:
    """The limit that candidates had on the rise of the loss on source data, and what it costs.

    Attributes:
        limit: what the loss may rise by, in its own unit: nats for classes and tokens.
        none_keeps_it: whether all of the longest trainings forget more.
        best: the one with the best metric, within the limit or not.
        least: the one whose source loss rises least.
        cost: difference of the recommended candidate to `best`; None if it is that one, or if none is recommended.
    """

    limit: float
    none_keeps_it: bool
    best: Trained
    least: Trained
    cost: Difference | None


@dataclass(frozen=True)
class CostReport:
    """The cost of advice: planned and needed, in full fine-tunings."""

    trainings: int
    planned: float
    full_trainings: float
    seconds_each: float
    seconds: float


@dataclass(frozen=True)
class Advice:
    """A recommended candidate, with the evidence.

    Attributes:
        date, versions, machine: of the trainings.
        recipe: its keys.
        metric, validation_examples: by which the candidates were judged, and on how many examples.
        share: of the recipe's steps in the longest trainings.
        surgery: whether the recommended candidate chooses blocks.
        recommended: the candidate; None where nothing has learned.
        tied, all_tied: those that are as good within noise, and whether that is all of the last round.
        unfit: candidates that do not fit the model, and why.
        methods: all candidates that do.
        scores, signature: of the blocks, and of the shift.
        cost: of the advice.
        sentences: the advice in words.
        constant: what the same answer for all gives; None where answers are no classes, or an earlier version asked.
        source_examples: how many the source loss is measured on; None without source data, or of an earlier version.
        forgetting: the limit on the rise of that loss; None where there was none.
    """

    date: str
    versions: dict[str, str]
    machine: str
    recipe: dict[str, Any]
    metric: str
    validation_examples: int
    share: float
    surgery: bool
    recommended: Recommendation | None
    tied: list[str]
    all_tied: bool
    unfit: dict[str, str]
    methods: list[CandidateReport]
    scores: ScoreReport
    signature: SignatureReport
    cost: CostReport
    sentences: list[str] = field(default_factory=list)
    constant: ConstantReport | None = None
    source_examples: int | None = None
    forgetting: ForgettingReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `advice.json` holds it."""
        return to_json(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Advice:
        """The advice in an `advice.json`.

        Raises:
            SurgicalError: something is missing or of a wrong type; the message names it.
        """
        return _JSON.read(cls, values)

    @property
    def chosen(self) -> str | None:
        """The name of the recommended candidate."""
        return self.recommended.method if self.recommended else None

    @property
    def is_share(self) -> bool:
        """The metric is a share, shown in percent."""
        metrics = [probe.metric for row in self.methods for probe in row.probes]
        return all(0 <= metric <= 1 for metric in metrics if metric is not None)
