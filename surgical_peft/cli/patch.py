"""The command that changes a checkpoint in its place: `surgical-peft patch`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, print_json, print_lines


def patch(
    source: Annotated[
        Path, typer.Argument(metavar="PATCH", help="The folder patch/ or undo/ that `export --format patch` wrote.")
    ],
    checkpoint: Annotated[Path, typer.Argument(help="A folder with the base model's safetensors: they are changed.")],
    as_json: AsJson = False,
) -> None:
    """Put a patch's weights into a checkpoint, in its place; the undo puts the base model's back, to the byte."""
    from ..export.patch import apply_patch

    report = apply_patch(source, checkpoint)
    if as_json:
        print_json(asdict(report))
    else:
        print_lines(
            [
                f"{checkpoint}: {report.tensors} weights of {', '.join(report.layers)} replaced in "
                f"{', '.join(report.files)}."
            ]
        )
