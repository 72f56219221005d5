"""The rows of advice: each candidate with what was trained and where it stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ...atomic_files import finite
from ...tuner.config import SurgicalConfig
from ...typed_json import default_of
from ..recipe.recipe import Recipe
from .advice import CandidateReport, Difference, ProbeReport, SignatureReport
from .shift_signature import Signature
from .successive_halving import ROUNDS, Candidate, ValidationJudge

_LINES: Mapping[str, dict[str, Any]] = {  # what a recipe says for those that choose no blocks
    "full": {"blocks": "all"},
    "layer_decay": {"blocks": "all", "policy": "layer_decay", "policy_options": {"decay": 0.75}},
}
_CHOOSING = ("criterion", "criterion_options", "num_blocks", "target_modules", "exclude_modules")
_TAKEN_BACK = ("policy", "policy_options", *_CHOOSING)


def twin_of(candidate: Candidate, candidates: dict[str, Candidate]) -> str | None:
    """The name of an earlier candidate that tunes the same blocks."""
    if candidate.method.choose is None:
        return None
    for name, other in candidates.items():
        if other is candidate:
            return None
        if other.selection.blocks == candidate.selection.blocks:
            return name
    return None


def lines_of(candidate: Candidate, recipe: Recipe) -> dict[str, Any]:
    """The lines to write into the recipe to train a candidate, and nothing for the model as it is.

    What the recipe says of choosing blocks and of their rates is taken back: the short trainings did without.
    """
    if candidate.best.rate is None:
        return {}
    if candidate.name in _LINES:
        lines = dict(_LINES[candidate.name])
    else:
        lines = {"blocks": SurgicalConfig.from_selection(candidate.selection).blocks}
    for entry in fields(recipe):
        default = default_of(entry)
        if entry.name in _TAKEN_BACK and entry.name not in lines and getattr(recipe, entry.name) != default:
            lines[entry.name] = default
    return {**lines, "learning_rate": candidate.best.rate}


def row_of(
    candidate: Candidate,
    candidates: dict[str, Candidate],
    finalists: Sequence[Candidate],
    best: Candidate,
    judge: ValidationJudge,
) -> CandidateReport:
    """A candidate's row: what was trained, and where it stands among the `finalists`, of which `best` is the best."""
    probes = [
        ProbeReport(p.rate, p.share, finite(p.metric), p.seconds, finite_or_none(p.source_loss_rise))
        for p in candidate.probes
    ]
    last = candidate.best if candidate in finalists else None
    to_best = None
    if last and candidate is not best and math.isfinite(last.metric):
        error = judge.standard_error(candidate.best, best.best)
        to_best = Difference(last.metric - best.best.metric, finite(error))
    rates = [probe.rate or 0 for probe in candidate.probes if probe.share == ROUNDS[0].share]
    return CandidateReport(
        method=candidate.name,
        title=candidate.method.title,
        surgery=candidate.method.choose is not None,
        same_as=twin_of(candidate, candidates),
        blocks=list(candidate.selection.blocks),
        tuned_parameters=candidate.tuned,
        probes=probes,
        rate=candidate.best.rate if candidate.probes else None,
        at_edge=len(rates) > 1 and candidate.best.rate in (min(rates), max(rates)),
        validation=finite(last.metric) if last else None,
        to_best=to_best,
        source_loss_rise=finite_or_none(candidate.best.source_loss_rise) if candidate.probes else None,
        forgets_more=candidate in finalists and not candidate.keeps_limit,
    )


def finite_or_none(value: float | None) -> float | None:
    """As `finite`, of what may not have been measured."""
    return None if value is None else finite(value)


def signature_report(signature: Signature) -> SignatureReport:
    """A signature with what follows from it."""
    return SignatureReport(**asdict(signature), moving=list(signature.moving), kind=signature.kind)
