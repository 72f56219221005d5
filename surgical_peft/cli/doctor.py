"""The command that looks at a training before it runs: `surgical-peft doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .experiments import open_recipe
from .options import AllowCode, AsJson, Tiny, console, print_json, print_lines


def doctor(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe; or a model's folder or Hub id, for made-up input.")
    ],
    adapter: Annotated[
        Path | None, typer.Argument(help="The folder of a run or of an adapter, to look at its training on.")
    ] = None,
    tiny: Tiny = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Take one real step and tell of every tensor: trained, in the optimizer, used, moved; exit code 1 for a fault.

    Nothing is written, and what the step moved is put back.
    """
    from ..errors import SurgicalError
    from ..experiments.doctor import doctor_of_model, doctor_of_recipe

    if source.endswith((".yaml", ".yml")):
        recipe, _ = open_recipe(Path(source), allow_code, tiny)
        diagnosis = doctor_of_recipe(recipe, adapter, Console(stderr=True, quiet=as_json))
    elif tiny:
        raise SurgicalError(f"--tiny is for recipes, which say what to make, and {source!r} is none: leave it out.")
    else:
        diagnosis = doctor_of_model(source, adapter)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        console.print(diagnosis.table())
        print_lines(diagnosis.lines())
    if not diagnosis.is_healthy:
        raise typer.Exit(1)
