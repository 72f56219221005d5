"""The commands that begin with a recipe: `surgical-peft start | recipe`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import AllowCode, AsJson, console, print_json, print_lines


def start(
    model: Annotated[str, typer.Argument(help="A model folder or a Hub id.")],
    data: Annotated[str, typer.Argument(help="Your data: a folder of images, a CSV, JSON or Parquet file, a Hub id.")],
    recipe: Annotated[Path, typer.Option("--recipe", help="The file to write.")] = Path("recipe.yaml"),
    task: Annotated[
        str | None, typer.Option(help="Task, a name or package.module:name; default is what model and data speak for.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=NAME", help="A column that cannot be told, as label=stars.")
    ] = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Begin here: read a model and data, say what each command will cost, and write a first recipe."""
    from ..atomic_files import write_text
    from ..errors import SurgicalError
    from ..experiments.start.start import recipe_text, to_json
    from ..experiments.start.start import start as start_on
    from ..experiments.training.cost import memory_in_words
    from ..rendering import TextTable, clock

    if recipe.exists():
        raise SurgicalError(f"{recipe} is there already and is not replaced: give another name, --recipe NAME.yaml.")
    columns = {}
    for given in column or []:
        role, is_pair, name = given.partition("=")
        if not is_pair or not name:
            raise SurgicalError(f"--column {given}: write ROLE=NAME, as --column label=stars.")
        columns[role] = name
    progress = Console(stderr=True, quiet=as_json)
    found = start_on(model, data, task, progress, columns=columns, allow_code=allow_code)
    write_text(recipe, recipe_text(found, recipe))
    if as_json:
        print_json(to_json(found, recipe))
        return
    other = "" if task else " Another is named by --task."
    print_lines(
        [f"Model: {found.model}.", f"Task: {found.recipe.task}.{other}", *(f"Data: {line}." for line in found.data)]
    )
    print_lines(f"Written for you: {key}: true. Without it: {reason}" for key, reason in found.reasons.items())
    rows = [[f"surgical-peft {step.command} {recipe}", clock(step.seconds), step.answers] for step in found.steps]
    notes = ["Time: about, at most, on this machine as it is now.", memory_in_words(found.memory, 1)]
    console.print(TextTable("What you can do next", ["command", "time", "what for"], rows, notes, left=(0, 2)))
    print_lines([f"Recipe: {recipe}. It is a first guess: look at its learning_rate and num_train_epochs."])


def recipe(
    keys: Annotated[bool, typer.Option("--keys", help="List the keys of a recipe.")] = False, as_json: AsJson = False
) -> None:
    """List the keys that a recipe may have, with their meaning and defaults; needs --keys."""
    from ..errors import SurgicalError
    from ..experiments.recipe.keys import SECTIONS, default_in_words, recipe_keys
    from ..rendering import TextTable

    if not keys:
        raise SurgicalError("give --keys to list the keys of a recipe; `surgical-peft start` writes one.")
    if as_json:
        print_json([{**asdict(key), "default": default_in_words(key)} for key in recipe_keys()])
        return
    for title in SECTIONS:
        rows = [[key.name, default_in_words(key), key.description] for key in recipe_keys() if key.section == title]
        console.print(TextTable(title, ["key", "default", "meaning"], rows, [""], left=(0, 1, 2)))
    print_lines(
        ["Every other key is one of transformers.TrainingArguments: learning_rate, num_train_epochs, seed, ..."]
    )
