"""Refuses names and regular expressions that a config should not hold: paths, wrong types, endless matching."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from ..errors import SurgicalError

LONGEST_MATCHING = 5.0  # seconds for all modules of a model together; sensible expressions take milliseconds

_PATH = re.compile(r"[/~]|[A-Za-z]:[/\\]|(?:.*[/\\])?\.\.(?:[/\\]|$)|.*[\x00-\x1f]", re.DOTALL)
_TRIAL = """
import json, re, sys
pattern, names = json.load(sys.stdin)
for name in names:
    re.fullmatch(pattern, name)
"""


def check_names(field: str, value: Any) -> None:
    """Refuse what cannot be a choice of modules: `None`, a string, a list of strings, a dictionary of choices.

    Raises:
        SurgicalError: another type, a file path instead of a name, or a string that is no regular expression.
    """
    if isinstance(value, dict):
        for key, choice in value.items():
            check_names(f"{field}[{key!r}]", choice)
    elif isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise SurgicalError(
                f"{field}={value!r} is a string, so a regular expression for the whole name, but not a valid one: "
                f"{error}. For names that end so give a list: {field}=[{value!r}]."
            ) from error
    elif isinstance(value, list):
        for name in value:
            _check_name(field, name)
    elif value is not None:
        raise SurgicalError(f"{field}={value!r} is a {type(value).__name__}: give a string or a list of strings.")


def _check_name(field: str, name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise SurgicalError(f"{field} holds {name!r}, which is no name of a module: give names as strings.")
    if _PATH.match(name):
        raise SurgicalError(
            f"{field} holds {name!r}, which looks like a file path; names of modules are asked for, such as "
            "'attention' or 'layers.0'. Was the config tampered with?"
        )


def check_head_config(value: dict[str, Any] | None) -> None:
    """Refuse what cannot be said of a head: a number of labels, their names by number, and a type of problem.

    Raises:
        SurgicalError: another type, or names that are not those of the labels.
    """
    if value is None:
        return
    names, kinds = value.get("id2label", {}), {"problem_type": str, "pad_token_id": int}
    is_dict = isinstance(names, dict)
    count = value.get("num_labels", len(names) or int("problem_type" in value) if is_dict else 0)
    is_count = isinstance(count, int) and 0 < count < 10**6
    are_names = is_dict and all(isinstance(name, str) for name in names.values())
    if names and is_count and are_names:
        are_names = names.keys() == {str(label) for label in range(count)}
    if not (is_count and are_names and all(isinstance(value.get(key, kind()), kind) for key, kind in kinds.items())):
        raise SurgicalError(
            f"head_config={value!r} is no head: num_labels is a number, id2label the names of '0', '1' and so on, "
            "problem_type a string, pad_token_id a number."
        )


def check_matching(expressions: dict[str, str], names: Iterable[str]) -> None:
    """Refuse regular expressions that would match without end.

    Python's matching cannot be stopped from within. So an expression that could backtrack badly (a repeated group, a
    back-reference, or more than two repeats) is first tried on `names` in a process of its own, which can be.

    Args:
        expressions: the field that each stands in, and the expression.
        names: the names that it will be matched against.

    Raises:
        SurgicalError: it took longer than `LONGEST_MATCHING`.
    """
    tried = list(dict.fromkeys(names))
    for field, expression in expressions.items():
        if not re.search(r"\)[*+?{]|\\[1-9]|\(\?P=", expression) and len(re.findall(r"[*+{]", expression)) <= 2:
            continue
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _TRIAL],
                input=json.dumps([expression, tried]).encode(),
                timeout=LONGEST_MATCHING,
                check=True,
                capture_output=True,
            )
        except subprocess.SubprocessError as error:  # too long, or out of memory or stack
            raise SurgicalError(
                f"{field}={expression!r} could not be matched with the {len(tried)} module names within "
                f"{LONGEST_MATCHING:g} seconds: repeats inside repeats backtrack without end. Write it without, or "
                "list the names."
            ) from error
