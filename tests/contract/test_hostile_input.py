"""Every family of generated input: refused by a clear error, or accepted and right; `benchmarks/fuzz.py` does more."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from surgical_peft import SurgicalError
from tests.support.fuzz.families import FAMILIES
from tests.support.fuzz.outcomes import Family, fault_of, run
from tests.support.fuzz.recipes import HINTS, MEANING

_FEW = {"recipes, values of keys": 60, "recipes, text": 60, "regular expressions": 6, "studies": 6, "data tables": 12}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_generated_input_is_refused_or_right(family: Family) -> None:
    tally = run(family, _FEW.get(family.name, 18))
    assert not tally.others
    assert tally.clear


def test_every_number_of_a_recipe_has_a_meaning() -> None:
    """A new key is fuzzed by its type alone; whoever adds a number says here what it has to be."""
    numbers = {key for key, hint in HINTS.items() if re.search(r"\b(int|float)\b", str(hint))}
    assert numbers - {"blocks", "label_map"} <= MEANING.keys()


def _raises(case: Any, folder: Path) -> None:
    raise {"ours": SurgicalError("no"), "long": ValueError("x"), "wrong": AssertionError("other weights")}[case]


def _hangs(case: Any, folder: Path) -> None:
    time.sleep(5)


def test_what_is_neither_is_counted() -> None:
    """The counter itself can fail."""
    tally = run(Family("toys", st.sampled_from(["ours", "long", "wrong"]), _raises), 30)
    assert tally.clear == 1 and not tally.right
    assert sorted(line.partition(": ")[2][:9] for line in tally.others) == ["Assertion", "ValueErro"]
    assert "seconds" in str(fault_of(Family("toys", st.none(), _hangs), None, longest=0.05)[1])
