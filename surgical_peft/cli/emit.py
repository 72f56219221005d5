"""The command that hands a choice to another tool: `surgical-peft emit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowCode, AsJson, print_json


def emit(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SELECTION|RECIPE|ADAPTER",
            help="A search.json, or the saved output of `score --json`; a recipe; the folder of a run or an adapter.",
        ),
    ],
    target: Annotated[
        str,
        typer.Option("--for", help="axolotl, llama-factory, ms-swift, trl, unsloth or verl; or package.module:name."),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The base model, a folder or a Hub id; default is what the recipe or adapter names."),
    ] = None,
    num_blocks: Annotated[int | None, typer.Option(min=1, help="How many blocks to take, of saved scores.")] = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Print the choice as another tool reads it; refused, with the nearest, where the tool cannot train just that."""
    from ..experiments.emit import emit as emit_from

    emission = emit_from(source, target, base_model=base, num_blocks=num_blocks, allow_code=allow_code)
    if as_json:
        trained = sorted(emission.trained)
        print_json({"target": target, "file": emission.file, "text": emission.text, "parameters": trained})
    else:
        print(emission.text, end="")
