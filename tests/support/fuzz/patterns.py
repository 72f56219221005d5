"""Regular expressions wherever a config takes them: they match as Python's do, and in seconds, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from surgical_peft.tuner import name_checks

from .configs import check_arguments
from .outcomes import Family

_ATOMS = ["a", ".", r"\w", r"\.", "e", "[a-z]", r"\d", "layer", "(?:bert)", "^", "$", r"\b", "(?=b)", "(?i:B)"]
_REPEATS = ["", "*", "+", "?", "{2,}", "*?", "{0,99}", "{65536}"]


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.tuples(
        st.sampled_from(["(", "(?:"]), st.lists(inner, min_size=1, max_size=3), st.sampled_from(_REPEATS)
    )
    return st.one_of(
        group.map(lambda parts: f"{parts[0]}{''.join(parts[1])}){parts[2]}"),
        group.map(lambda parts: f"{parts[0]}{'|'.join(parts[1])}){parts[2]}"),
        st.lists(inner, min_size=1, max_size=3).map("".join),
    )


_atoms = st.tuples(st.sampled_from(_ATOMS), st.sampled_from(_REPEATS)).map("".join)
patterns = st.recursive(_atoms, _grown, max_leaves=6) | st.sampled_from(
    [r"(\w+\.?)+!", "(a+)+", r"(\w*)*\1x", "(.*)*" * 5]
)
_RANKS = ("rank_pattern", "alpha_pattern")


@st.composite
def _configs(draw: st.DrawFn) -> dict[str, Any]:
    place = draw(
        st.sampled_from(["targets", "excluded", "by block", "lora", "lora excluded", *_RANKS, "layers_pattern"])
    )
    pattern = draw(patterns)
    if place == "targets":
        return {"target_modules": pattern, **draw(st.sampled_from([{}, {"blocks": "all"}]))}
    if place == "excluded":
        return {"blocks": "all", "exclude_modules": pattern}
    if place == "by block":
        return {"target_modules": {"0": pattern, "head": "all"}}
    lora: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"]}
    if place == "lora":
        lora["target_modules"] = pattern
    elif place == "lora excluded":
        lora["exclude_modules"] = pattern
    elif place in _RANKS:
        lora[place] = {pattern: 3, **dict.fromkeys(draw(st.lists(patterns, max_size=3)), 2)}
    else:
        lora |= {place: [pattern], "layers_to_transform": [0, 1]}
    return {"blocks": ["head"], "lora": lora}


def check(given: dict[str, Any], folder: Path) -> None:
    """As any other config; a second of matching is enough to know a pattern that has no end."""
    before, name_checks.LONGEST_MATCHING = name_checks.LONGEST_MATCHING, 1.0
    try:
        check_arguments(given, folder)
    finally:
        name_checks.LONGEST_MATCHING = before


FAMILIES = [Family("regular expressions", _configs(), check)]
