"""The keys of a recipe as a table, made of the sections' fields and docstrings."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ...typed_json import default_of
from .recipe import NOT_KEYS, Recipe
from .sections import CompareSection, DataSection, PolicySection, SearchSection, SelectionSection

SECTIONS = {
    "Model and data": DataSection,
    "Blocks": SelectionSection,
    "Training": PolicySection,
    "Search": SearchSection,
    "Comparison and advice": CompareSection,
    "Trying out": Recipe,
}
_KEY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_LINK = re.compile(r"\[(`[^`]+`)\]\[[\w.]+\]")  # of mkdocstrings


@dataclass(frozen=True)
class RecipeKey:
    """A key of a recipe.

    Attributes:
        name: as the file has it.
        section: the heading that it belongs under.
        type: of its value, as Python writes it.
        default: `MISSING` of `dataclasses` if it has to be given.
        description: one line.
    """

    name: str
    section: str
    type: str
    default: Any
    description: str


def recipe_keys() -> list[RecipeKey]:
    """All keys of a recipe but those of `transformers.TrainingArguments`, in the order of its sections.

    Example:
        >>> next(key for key in recipe_keys() if key.name == "severity").description
        'of the corruption, 1 to 5.'
    """
    keys = []
    for title, section in SECTIONS.items():
        _, _, attributes = (inspect.getdoc(section) or "").partition("Attributes:\n")
        described = {name: " ".join(text.split()) for name, text in _KEY.findall(attributes)}
        for entry in fields(section):
            if entry.name in section.__annotations__ and entry.name not in NOT_KEYS:
                description = _LINK.sub(r"\1", described[entry.name])
                keys.append(RecipeKey(entry.name, title, str(entry.type), default_of(entry), description))
    return keys


def keys_markdown() -> str:
    """The keys as Markdown, a table for each section.

    Example:
        >>> keys_markdown().splitlines()[0]
        '**Model and data**'
    """
    lines: list[str] = []
    for title in SECTIONS:
        lines += ["", f"**{title}**", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        for key in recipe_keys():
            if key.section == title:
                cells = key.name, f"`{key.type}`", default_in_words(key), key.description
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:])


def default_in_words(key: RecipeKey) -> str:
    """The default of a key as YAML writes it; "required" where there is none.

    Example:
        >>> [default_in_words(key) for key in recipe_keys() if key.name in ("model", "task", "metric")]
        ['required', 'image_classification', '']
    """
    if key.default is MISSING:
        return "required"
    if key.default is None or key.default == {}:
        return ""
    return str(key.default).lower() if isinstance(key.default, bool) else str(key.default)
