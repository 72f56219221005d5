"""The command that uses what was trained: `surgical-peft predict`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import AsJson, console, print_json

_TOP = 3  # labels that are shown of each input


def predict(
    folder: Annotated[Path, typer.Argument(help="The folder that `surgical-peft train` wrote, or an adapter's.")],
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Images; or texts, or text files with one in each line.")
    ],
    base: Annotated[
        str | None, typer.Option(help="The base model, a folder or a Hub id; default is what the adapter names.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a tuned model makes of new images or texts: labels with their scores, or what it writes."""
    from ..experiments.predict import predict as predict_inputs

    predictions = predict_inputs(folder, inputs, base, Console(stderr=True, quiet=as_json))
    if as_json:
        print_json([asdict(prediction) for prediction in predictions])
        return
    for prediction in predictions:
        top = list(prediction.labels.items())[:_TOP]
        words = [f"{word['word']}: {word['label']} {word['score']:.3f}" for word in prediction.words]
        answer = prediction.text or ", ".join([*(f"{label} {score:.3f}" for label, score in top), *words]) or "nothing"
        console.print(f"{prediction.input}: {answer}", markup=False, highlight=False, soft_wrap=True)
