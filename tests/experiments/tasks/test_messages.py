"""What is said of data that are faulty or ambiguous; `python -m tests.support.faulty_data` prints all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from surgical_peft.experiments.recipe.recipe import Recipe
from tests.support.faulty_data import CASES, said_of, toys


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Recipe]:
    return toys(tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize("name", CASES)
def test_it_is_said(name: str, tmp_path: Path, recipes: tuple[Recipe, Recipe]) -> None:
    case = CASES[name]
    is_read, text = said_of(case, tmp_path, *recipes)
    assert is_read == case.is_read, text
    assert re.search(case.words, text), text
