"""Checks of settings, and the functions that names in YAML or on the command line stand for."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from surgical_peft import SurgicalError, criteria, policies
from surgical_peft.validation import (
    check_cadence,
    check_choice,
    check_count,
    check_number,
    check_rates,
    immutable,
    nearest,
    resolve,
)


def test_a_known_name_is_the_function_of_the_package() -> None:
    assert resolve("rgn", criteria) is criteria.rgn
    assert resolve("layer_decay", policies) is policies.layer_decay


def test_the_users_own_function() -> None:
    assert resolve("math:sqrt", criteria) is math.sqrt
    assert resolve("surgical_peft.criteria.rgn:rgn", criteria) is criteria.rgn


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("rgm", "'rgm'.*'rgn'.*rgn"),
        ("norm", "'norm'"),  # in the package's files, but not exported
        ("xyzzy", "criteria: There are"),
        ("", "none of the criteria"),
        ("no_such_module:f", "'no_such_module'"),
        ("math:no_such_function", "no attribute 'no_such_function'"),
        (":f", "cannot be imported"),
        ("math:", "cannot be imported"),
        (".math:f", "cannot be imported"),
        ("math:pi", "'math:pi'.*float"),
    ],
)
def test_a_wrong_name_is_refused(name: str, why: str) -> None:
    """`:f` and `.math:f` ended in importlib's own ValueError and TypeError; `math:pi` only when it was called."""
    with pytest.raises(SurgicalError, match=why):
        resolve(name, criteria)


def test_an_error_inside_the_users_module_is_shown_as_it_is(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "faulty_criterion.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        resolve("faulty_criterion:f", criteria)


def test_the_message_names_the_kind() -> None:
    with pytest.raises(SurgicalError, match="'layer_decay'"):
        resolve("layerdecay", policies)


def test_nearest() -> None:
    assert nearest("blocs", ["blocks", "batches"]) == "did you mean 'blocks'? "
    assert nearest("zzz", ["blocks", "batches"]) == ""


@pytest.mark.parametrize("value", [0.25, 1, Fraction(1, 3), math.ulp(0)])
def test_a_number_within_its_bounds(value: Any) -> None:
    check_number("a test", "share", value, above=0, at_most=1)


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], 1j])
def test_a_number_that_is_none_or_out_of_its_bounds(value: Any) -> None:
    with pytest.raises(SurgicalError, match=r"share=.*a test.*above 0, at most 1"):
        check_number("a test", "share", value, above=0, at_most=1)


@pytest.mark.parametrize(("value", "bound"), [(1, "below"), (-1, "above"), (2, "at_most"), (-2, "at_least")])
def test_open_and_closed_bounds(value: int, bound: str) -> None:
    for number in (-2, -1, 0, 1, 2):
        inside = {"below": number < value, "above": number > value, "at_most": number <= value}.get(
            bound, number >= value
        )
        if inside:
            check_number("a test", "x", number, **{bound: value})  # type: ignore[arg-type]
        else:
            with pytest.raises(SurgicalError, match=bound.replace("_", " ")):
                check_number("a test", "x", number, **{bound: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, True, "1", None, math.nan, 6])
def test_a_count_is_a_whole_number_from_one_upwards(value: Any) -> None:
    check_count("a test", "k", 1, "blocks", at_most=5)
    check_count("a test", "k", 5, "blocks", at_most=5)
    check_count("a test", "seed", -7, "of the draws", at_least=-math.inf)
    with pytest.raises(SurgicalError, match=r"k=.*a test: blocks.*from 1 to 5"):
        check_count("a test", "k", value, "blocks", at_most=5)


@pytest.mark.parametrize("value", ["kep", None, 3, ["keep"], {}])
def test_a_choice_is_one_of_the_known_ones(value: Any) -> None:
    check_choice("a test", "state", "keep", ("keep", "reset"))
    check_choice("a test", "state", "keep", {"keep": 1, "reset": 2})
    hint = "did you mean 'keep'" if value == "kep" else ""
    with pytest.raises(SurgicalError, match=f"state=.*a test.*{hint}.*keep, reset"):
        check_choice("a test", "state", value, {"keep": 1, "reset": 2})


@pytest.mark.parametrize("value", ["epoc", 0, 2.0, None])
def test_a_cadence_is_a_word_or_a_number_of_steps(value: Any) -> None:
    check_cadence("a test", "epoch", ("epoch",))
    check_cadence("a test", 3, ("epoch",))
    with pytest.raises(SurgicalError, match=r"every=.*epoch.*steps"):
        check_cadence("a test", value, ("epoch",))


@pytest.mark.parametrize("rates", [[], 0.1, "fast", [0], [math.inf], [True], ["0.1"], [0.1, 0.1], None])
def test_a_grid_of_rates_is_of_different_numbers_above_zero(rates: Any) -> None:
    assert check_rates("a test", [3e-3, 1]) == (3e-3, 1.0)
    with pytest.raises(SurgicalError, match="a test"):
        check_rates("a test", rates)


def test_a_setting_that_is_a_list_is_kept_from_changes() -> None:
    given = [0, "head"]
    kept = immutable(given)
    given.append(1)
    assert kept == (0, "head")
    assert immutable(range(2)) == (0, 1)
    assert [immutable(value) for value in ("head", 3, None, {"0": 1.0})] == ["head", 3, None, {"0": 1.0}]
