from __future__ import annotations

from dataclasses import fields

from surgical_peft.experiments.recipe import Recipe
from surgical_peft.experiments.recipe.keys import keys_markdown, recipe_keys
from surgical_peft.experiments.recipe.recipe import NOT_KEYS


def test_every_key_has_a_type_and_a_line() -> None:
    keys = recipe_keys()
    assert sorted(key.name for key in keys) == sorted(f.name for f in fields(Recipe) if f.name not in NOT_KEYS)
    for key in keys:
        assert key.type != "Any" and key.description.endswith("."), key
    assert {key.name for key in keys if key.section == "Trying out"} == {"tiny"}


def test_the_table_shows_defaults_as_yaml_has_them() -> None:
    rows = {line.split(" | ")[0]: line for line in keys_markdown().splitlines() if line.startswith("| ")}
    assert "| required |" in rows["| model"]
    assert "| 5 |" in rows["| severity"]
    assert "| true |" in rows["| frozen_eval"]
    assert "|  |" in rows["| metric"]
