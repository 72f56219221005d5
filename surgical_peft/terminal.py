"""What the commands share: the terminal, and the arguments that many of them have."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say how many trainings it takes, and how long about.")]
Tiny = Annotated[
    bool,
    typer.Option(
        "--tiny", help="Try the recipe without its model and data: random weights, generated data, a few steps."
    ),
]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a flat YAML file, see recipes/.")]


def print_json(data: Any) -> None:
    """Print plain data to the standard output."""
    print(json.dumps(data, indent=2))


def in_words(seconds: float) -> str:
    """A time for people: `42.0 s`, or `1:02:03`.

    Example:
        >>> in_words(90)
        '0:01:30'
    """
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
