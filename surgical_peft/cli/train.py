"""`surgical-peft train`: one training of a recipe."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .experiments import open_recipe
from .options import AllowCode, AsJson, RecipeFile, Tiny, console, print_json, print_lines


def train(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default is the recipe's.")] = None,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Run what lies before the first tuned block once for each example.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what is tuned, and what the prefix cache takes.")
    ] = False,
    tiny: Tiny = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Choose the blocks, tune them, measure, and save the adapter; the same command goes on after Ctrl-C."""
    from ..experiments.training.summary import last_lines, table
    from ..experiments.training.train import train as train_recipe
    from ..experiments.training.train_plan import plan

    loaded, output = open_recipe(recipe, allow_code, tiny, output, dry_run)
    if prefix_cache:
        loaded = replace(loaded, prefix_cache=True)
    with contextlib.redirect_stdout(sys.stderr):  # what Trainer prints must not come between the JSON
        if dry_run:
            planned = plan(loaded, output, Console(stderr=True, quiet=as_json))
        else:
            report = train_recipe(loaded, output, Console(stderr=True, quiet=as_json))
    if dry_run:
        if as_json:
            print_json(asdict(planned))
        else:
            print_lines(planned.lines())
        return
    if as_json:
        print_json(report.to_json())
        return
    console.print(table(report))
    print_lines(last_lines(report))
