"""Values that no setting should have, values of a type, and an own test of whether a value is of a type."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

WORDS = [
    *("", " ", "x", "0", "-1", "1e30", "nan", "true", "None", "\0", "a\0b", "\n", "\x1b[31m", "\u202e", "é", "🦊"),
    *("../../etc/passwd", "/etc/passwd", "~", "C:\\x", "os:system", "a.b:c", ":", "[bold]x[/]", "[/red]", "{{7*7}}"),
    *("(a+)+$", r"(\w+\.?)+!", "*", "[", "(?P<a>", ".*.*.*=", "0:", "9" * 5000, "x" * 5000, "y" * 300_000),
]
NUMBERS = [0, 1, -1, 2, 3, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.5, 1e30, 1e-300, math.nan, math.inf, -math.inf]
ODD: list[Any] = [
    *(*WORDS, *NUMBERS, None, True, False, [], [[]], [None], {}, [{}], {"": None}, {"x": 5}, {"0": "all"}, [1, "a"]),
    *([0, [1]], ["x", 3], {"a": {"b": [1]}}, [1e30], [-1], list(range(2000)), [0.1, 0.1], ["a"], {"a": [None]}),
]
odd = st.sampled_from(ODD) | st.text(max_size=8) | st.integers() | st.floats() | st.lists(st.sampled_from(WORDS))


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, as far as JSON and YAML can write them; odd ones for what they cannot."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(part) for part in parts])
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (list, tuple):
        return st.lists(values_of(parts[0]), max_size=4)
    if origin in (dict, Mapping):
        return st.dictionaries(values_of(parts[0]), values_of(parts[1]), max_size=4)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from([member.value for member in hint])
    simple = {int: st.integers(-2, 12), bool: st.booleans(), NoneType: st.none(), dict: st.just({}), list: st.just([])}
    simple[float] = st.sampled_from([0.0, 1e-3, 0.5, 1.0, 2.0, 100.0, -1.0]) | st.floats(0, 1)
    simple[str] = st.sampled_from(["x", "0", "all", "auto", "no", "epoch", "steps", "a.b"]) | st.text(max_size=4)
    return simple.get(hint, odd)


def is_of(hint: Any, value: Any) -> bool:
    """True if a value is of a type; a whole number is a float, too, and a bool is no number."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, str):
        return True
    if origin in (Union, types.UnionType):
        return any(is_of(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(is_of(parts[0], part) for part in value)
    if origin is list:
        return isinstance(value, list) and all(is_of(parts[0], part) for part in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(is_of(parts[1], member) for member in value.values())
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return isinstance(value, hint) and all(is_of(hints[f.name], getattr(value, f.name)) for f in fields(hint))
    return isinstance(value, hint) if isinstance(hint, type) else True


def sample(hint: Any) -> Any:
    """Some value of a type, nested dataclasses included."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return sample(parts[0])
    if origin in (list, tuple):
        return origin([sample(parts[0])])
    if origin in (dict, Mapping):
        return {"0": sample(parts[1])}
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{entry.name: sample(hints[entry.name]) for entry in fields(hint)})
    return {int: 3, float: 0.5, str: "0", bool: True}.get(hint, {})
