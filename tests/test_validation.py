"""From a name in YAML or on the command line to the function."""

from __future__ import annotations

import math

import pytest

from surgical_peft import SurgicalError, criteria, policies
from surgical_peft.validation import nearest, resolve


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
