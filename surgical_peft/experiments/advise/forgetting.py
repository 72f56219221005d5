"""The limit of advice on what a candidate may forget: what it costs, as data and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from ...atomic_files import finite
from ...errors import SurgicalError
from ..recipe.recipe import Recipe
from ..training.source_data import unit_of_loss
from .advice import Advice, Difference, ForgettingReport, Trained
from .rows import finite_or_none
from .successive_halving import Candidate, ShortTraining, ValidationJudge, best_of_all, ordered


def check_limit(recipe: Recipe, limit: float | None) -> None:
    """Refuse a limit that is none, or that nothing can be measured against.

    Raises:
        SurgicalError: it is below 0 or no number, or the recipe has no `source_data`.
    """
    if limit is None:
        return
    if not 0 <= limit < math.inf:
        raise SurgicalError(
            f"max_forgetting={limit} is no limit: write by how much the mean loss on source_data may rise, 0 or more, "
            "such as 0.05 (nats)."
        )
    if recipe.source_data is None:
        raise SurgicalError(
            f"max_forgetting={limit}: the recipe has no source_data to measure the rise of the loss on: write data of "
            "the task that the source model was trained for into it, such as source_data: folder."
        )


def forgetting_report(
    trained: Sequence[Candidate], chosen: Candidate | None, limit: float, judge: ValidationJudge
) -> ForgettingReport:
    """The limit, and what it costs.

    Args:
        trained: the candidates that were trained longest.
        chosen: the recommended one.
        limit: what the source loss may rise by.
        judge: of differences.
    """
    best, probe = best_of_all(trained)
    pairs = [(candidate, longest) for candidate in trained for longest in candidate.longest]
    least = max(pairs, key=lambda pair: ordered(-_rise(pair[1])))
    cost = None
    if chosen is not None and chosen.best is not probe:
        cost = Difference(chosen.best.metric - probe.metric, finite(judge.standard_error(chosen.best, probe)))
    none_keeps_it = not any(candidate.keeps_limit for candidate in trained)
    return ForgettingReport(limit, none_keeps_it, _reported(best, probe), _reported(*least), cost)


def _rise(probe: ShortTraining) -> float:
    return math.nan if probe.source_loss_rise is None else probe.source_loss_rise


def _reported(candidate: Candidate, probe: ShortTraining) -> Trained:
    return Trained(candidate.method.title, probe.rate, finite(probe.metric), finite_or_none(probe.source_loss_rise))


def limit_in_words(advice: Advice) -> list[str]:
    """What the limit costs; or that none keeps it, and which forgets least. Nothing where there was no limit."""
    found = advice.forgetting
    if found is None:
        return []
    limit = f"at most {found.limit:g} {unit_of_loss(advice.recipe)}"
    longer = (
        f"That is after {Fraction(advice.share).limit_denominator(100)} of the steps; all of them may forget more."
    )
    if advice.recommended is None:
        lines = [
            f"Without the limit {_in_words(advice, found.best)} is best; it raises the source loss by "
            f"{_rise_of(found.best)}. {longer}"
        ]
        if found.none_keeps_it:
            least = f"{_rise_of(found.least)}, by {_in_words(advice, found.least)}"
            lines.insert(
                0,
                f"Of the ways of tuning that were trained longest none keeps the limit, a rise of the source loss of "
                f"{limit}: the least is {least}. So none is recommended; only the model as it is forgets nothing.",
            )
        return lines
    text = f"Chosen among those that raise the source loss by {limit}. "
    if found.cost is None or found.cost.mean >= 0:
        return [f"{text}The limit costs nothing: none is better without it. {longer}"]
    scale, unit = (100, " points of") if advice.is_share else (1, " of")
    error = "" if found.cost.standard_error is None else f" ± {scale * found.cost.standard_error:.2g}"
    return [
        f"{text}The limit costs {-scale * found.cost.mean:.3g}{error}{unit} {advice.metric}: without it "
        f"{_in_words(advice, found.best)} is best, which raises the source loss by {_rise_of(found.best)}. {longer}"
    ]


def _in_words(advice: Advice, trained: Trained) -> str:
    rate = "" if trained.rate is None else f" at the rate {trained.rate:g}"
    scale, unit = (100, " %") if advice.is_share else (1, "")
    metric = "no number" if trained.metric is None else f"{scale * trained.metric:.4g}{unit}"
    return f"{trained.title}{rate} ({advice.metric} {metric})"


def _rise_of(trained: Trained) -> str:
    return "no number" if trained.source_loss_rise is None else f"{trained.source_loss_rise:.3g}"
