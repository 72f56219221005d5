"""What advice says of each candidate, in plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ...atomic_files import finite
from ...tuner.config import SurgicalConfig
from ..recipe.recipe import Recipe, default_of
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
    """What to write into the recipe to train it, and nothing for the model as it is.

    What the recipe says of choosing blocks and of their rates is taken back: the short trainings did without.
    """
    if candidate.best.rate is None:
        return {}
    if candidate.name in _LINES:
        own = dict(_LINES[candidate.name])
    else:
        own = {"blocks": SurgicalConfig.from_selection(candidate.selection).blocks}
    taken_back = {field.name: default_of(field) for field in fields(recipe) if field.name in _TAKEN_BACK}
    given = {name: value for name, value in taken_back.items() if getattr(recipe, name) != value and name not in own}
    return {**own, **given, "learning_rate": candidate.best.rate}


def row_of(
    candidate: Candidate,
    candidates: dict[str, Candidate],
    finalists: Sequence[Candidate],
    best: Candidate,
    judge: ValidationJudge,
) -> dict[str, Any]:
    """A candidate's row: what was trained, and where it stands.

    `to_best` is the paired difference to the best of the finalists, those trained longest or not at all; None for the
    best one and for those that are none.
    """
    probes = [
        {"rate": p.rate, "share": p.share, "metric": finite(p.metric), "seconds": p.seconds} for p in candidate.probes
    ]
    last = candidate.best if candidate in finalists else None
    to_best = None
    if last and candidate is not best and math.isfinite(last.metric):
        error = judge.standard_error(candidate.best, best.best)
        to_best = {"mean": finite(last.metric - best.best.metric), "standard_error": finite(error)}
    first = [each for each in candidate.probes if each.share == ROUNDS[0].share]
    return {
        "method": candidate.name,
        "title": candidate.method.title,
        "surgery": candidate.method.choose is not None,
        "same_as": twin_of(candidate, candidates),
        "blocks": list(candidate.selection.blocks),
        "tuned_parameters": candidate.tuned,
        "probes": probes,
        "rate": candidate.best.rate if candidate.probes else None,
        "at_edge": len(first) > 1
        and candidate.best.rate in (min(p.rate or 0 for p in first), max(p.rate or 0 for p in first)),
        "validation": finite(last.metric) if last else None,
        "to_best": to_best,
    }


def plain(found: Signature) -> dict[str, Any]:
    """A signature with what follows from it."""
    return {**asdict(found), "moving": list(found.moving), "kind": found.kind}
