"""All families of generated input."""

from __future__ import annotations

from . import adapters, configs, json_files, patterns, recipes, tables
from .outcomes import Family

FAMILIES: list[Family] = [
    family for part in (recipes, configs, patterns, adapters, json_files, tables) for family in part.FAMILIES
]
