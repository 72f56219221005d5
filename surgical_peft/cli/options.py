"""The terminal, and the arguments that many commands have."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

console = Console()
_kept: list[TextIO] = []  # the standard output of a command that prints JSON


@contextmanager
def _others_on_stderr() -> Iterator[None]:
    """Keeps the standard output for JSON: some libraries print there, as DeepSpeed its log."""
    _kept.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _kept.pop()


def _alone(context: typer.Context, value: bool) -> bool:
    if value:
        context.with_resource(_others_on_stderr())
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.", callback=_alone)]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run code that is not yours: what a recipe from elsewhere names, a Hub metric, code beside a model.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say how many trainings it takes, and how long about.")]
Tiny = Annotated[
    bool,
    typer.Option(
        "--tiny", help="Try the recipe without its model and data: random weights, generated data, a few steps."
    ),
]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a flat YAML file, see recipes/.")]


def print_json(data: Any) -> None:
    """Print plain data, or JSON that is ready, to the standard output; with `--json` nothing else is there."""
    text = data if isinstance(data, str) else json.dumps(data, indent=2)
    print(text, file=_kept[-1] if _kept else sys.stdout)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of words, wrapped between words; a no-break space holds two together."""
    for line in lines:
        wrapped = textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
        console.print(wrapped, markup=False, highlight=False, soft_wrap=True)
