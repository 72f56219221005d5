"""Refuses names and regular expressions that a config should not hold: paths, wrong types, endless matching."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SurgicalError, first_of

LONGEST_MATCHING = 5.0  # seconds for all modules of a model together; sensible expressions take milliseconds
MOST_EXPRESSIONS = 500  # of one adapter: `re` keeps 512 compiled
_LONGEST_EXPRESSION = 100_000  # characters
_LONG_NAME = 200  # characters; no module of a model has such a path

_PATH = re.compile(r"[/~]|[A-Za-z]:[/\\]|(?:.*[/\\])?\.\.(?:[/\\]|$)|.*[\x00-\x1f]", re.DOTALL)
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for name in names:
    for pattern in patterns:
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
        check_expression(field, value)
    elif isinstance(value, list):
        for name in value:
            _check_name(field, name)
    elif value is not None:
        raise SurgicalError(f"{field}={value!r} is a {type(value).__name__}: give a string or a list of strings.")


def check_expression(field: str, value: str) -> None:
    """Refuse a string that is no regular expression, or too long for one.

    Raises:
        SurgicalError: it is not, or is.
    """
    if len(value) > _LONGEST_EXPRESSION:
        raise SurgicalError(
            f"{field}={value[:40]!r}... has {len(value):,} characters, {_LONGEST_EXPRESSION:,} at most: list names."
        )
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise SurgicalError(
            f"{field}={value!r} is a string, so a regular expression for the whole name, but not a valid one: "
            f"{error}. For names that end so give a list: {field}=[{value!r}]."
        ) from error


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


def check_matching(expressions: Mapping[str, str], names: Iterable[str]) -> None:
    """Refuse regular expressions that would match without end.

    Python's matching cannot be stopped from within. So expressions that could backtrack badly (a repeated group, a
    back-reference, or more than two repeats), and all where a name is long, are first tried on `names`, in one process
    of their own, which can be.

    Args:
        expressions: the field that each stands in, and the expression.
        names: the names that it will be matched against.

    Raises:
        SurgicalError: one is not valid, they took longer than `LONGEST_MATCHING` together, or they are more than
            `MOST_EXPRESSIONS`.
    """
    if len(expressions) > MOST_EXPRESSIONS:
        raise SurgicalError(
            f"{len(expressions):,} regular expressions ({first_of(expressions, 3)}) are more than {MOST_EXPRESSIONS}, "
            "as many as Python keeps compiled, and each is matched with each module: write fewer that match more."
        )
    for field, expression in expressions.items():
        check_expression(field, expression)
    tried = list(dict.fromkeys(names))
    is_long = max(map(len, tried), default=0) > _LONG_NAME
    risky = {field: each for field, each in expressions.items() if is_long or _may_backtrack(each)}
    if not risky:
        return
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL],
            input=json.dumps([list(risky.values()), tried]).encode(),
            timeout=LONGEST_MATCHING,
            check=True,
            capture_output=True,
        )
    except subprocess.SubprocessError as error:  # too long, or out of memory or stack
        shown = first_of((f"{field}={expression!r}" for field, expression in risky.items()), 3)
        raise SurgicalError(
            f"{shown} could not be matched with the {len(tried)} module names within {LONGEST_MATCHING:g} seconds: "
            "repeats inside repeats backtrack without end. Write it without, or list the names."
        ) from error


def _may_backtrack(expression: str) -> bool:
    return bool(re.search(r"\)[*+?{]|\\[1-9]|\(\?P=", expression)) or len(re.findall(r"[*+{]", expression)) > 2
