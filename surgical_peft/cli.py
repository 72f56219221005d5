"""The command line: `surgical-peft blocks | score | train | export | quickstart`."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from . import criteria
from .blocks import BlockMap
from .errors import SurgicalError
from .names import resolve

app = typer.Typer(
    help="Fully fine-tune only the blocks of a transformer that new data need.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a flat YAML file, see recipes/.")]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Fully fine-tune only the blocks of a transformer that new data need."""


@app.command()
def blocks(
    model: Annotated[str, typer.Argument(help="A model folder or a Hub id; only its config is read.")],
    as_json: AsJson = False,
) -> None:
    """List the blocks of a model: names, modules, parameters and their share."""
    from .tasks import model_of_config

    network = model_of_config(model)
    found = BlockMap.find(network)
    sizes = {name: sum(p.numel() for p in group) for name, group in found.parameters(network).items()}
    total = sum(sizes.values())
    if as_json:
        rows = [(name, found.modules[name], size, size / total) for name, size in sizes.items()]
        _print_json([dict(zip(("block", "modules", "parameters", "share"), row, strict=True)) for row in rows])
        return
    table = Table(title=f"{found.model_name}: {len(sizes)} blocks, {total:,} parameters")
    for name, justify in (("block", "left"), ("modules", "left"), ("parameters", "right"), ("share", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, size in sizes.items():
        table.add_row(name, "\n".join(found.modules[name]), f"{size:,}", f"{size / total:.1%}")
    console.print(table)


@app.command()
def score(
    recipe: RecipeFile,
    criterion: Annotated[
        str | None, typer.Option(help="What to score by, instead of the recipe's: a name, or package.module:name.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the scores to this file as well (png, pdf or svg).")] = None,
    as_json: AsJson = False,
) -> None:
    """Score the blocks of a recipe's model on its training data."""
    from .recipe import load_recipe
    from .train import score as score_recipe

    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        raise SurgicalError(f"--plot {str(plot)!r}: the name must end in .png, .pdf or .svg.")
    found = load_recipe(recipe)
    if criterion:
        resolve(criterion, criteria)  # an unknown name is said now, not after the data are loaded
        found = replace(found, criterion=criterion, criterion_options={})
    scores = score_recipe(found)
    if plot:
        scores.plot(plot)
    if as_json:
        print(scores.to_json())
    else:
        console.print(scores.table())


@app.command()
def train(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default is the recipe's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the blocks, tune them, measure, and save the adapter."""
    from .recipe import load_recipe
    from .train import train as train_recipe

    with contextlib.redirect_stdout(sys.stderr):  # what Trainer prints must not come between the JSON
        report = train_recipe(load_recipe(recipe), output)
    if as_json:
        _print_json(report)
        return
    before, after = report["accuracy_before"], report["accuracy_after"]
    table = Table(title=f"Tuned: {', '.join(report['blocks'] or report['target_modules'])}")
    for name in ("accuracy", "before", "after"):
        table.add_column(name, justify="left" if name == "accuracy" else "right")
    for split in before:
        table.add_row(split, f"{before[split]:.1%}", f"{after[split]:.1%}")
    console.print(table)
    share = report["tuned_parameters"] / report["all_parameters"]
    console.print(f"{report['tuned_parameters']:,} of {report['all_parameters']:,} parameters tuned ({share:.1%}).")
    console.print(f"Adapter: {report['adapter']}")


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, or that of a delta.")],
    output: Annotated[Path, typer.Argument(help="A new or empty folder, or one of an earlier export.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft: for PEFT alone. merged: the whole model, for transformers alone. delta: what tuning changed, "
            "to the bit. lora: a low rank of that, for PEFT alone. adapter: back from a delta."
        ),
    ] = "peft",
    base: Annotated[
        str | None, typer.Option(help="The base model, a folder or a Hub id; default is what the adapter names.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA, for --format lora.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in a form that others load."""
    from .export import export as export_adapter

    report = export_adapter(adapter, output, format, base_model=base, rank=rank)
    if as_json:
        _print_json(report)
        return
    if format == "lora":
        table = Table(title=f"Rank {rank}: what is lost, of what tuning changed in Linear weights (Frobenius norm)")
        table.add_column("module")
        table.add_column("lost", justify="right")
        for name, error in {**report["error"], "all": report["total_error"]}.items():
            table.add_row(name, f"{error:.2%}")
        console.print(table)
        console.print(f"{report['lora_modules']} modules as LoRA; kept whole: {len(report['whole_modules'])}.")
    if format == "delta":
        console.print(
            f"The weights take {report['delta_bytes']:,} bytes for {report['adapter_bytes']:,}: {report['ratio']:.2f} "
            f"times smaller ({report['planes_ratio']:.2f} without the base model)."
        )
    console.print(f"{output}: {report['bytes']:,} bytes of weights.")


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("quickstart"),
    epochs: Annotated[float | None, typer.Option(min=0.1, help="Epochs of each training; default is 2.5.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show on real images which blocks matter, and what tuning only them gives; about 3 minutes on 2 cores."""
    from .quickstart import EPOCHS
    from .quickstart import quickstart as run_quickstart

    report = run_quickstart(output, Console(stderr=True, quiet=True) if as_json else console, epochs or EPOCHS)
    if as_json:
        _print_json(report)


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 2, unless `--debug` asks for the traceback."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.path.append(str(Path.cwd()))  # for a criterion or policy given as package.module:name
    debug = "--debug" in sys.argv
    try:
        app([argument for argument in sys.argv[1:] if argument != "--debug"])  # it may stand anywhere
    except (SurgicalError, OSError) as error:  # a folder that cannot be written to, say
        if debug:
            raise
        errors = Console(stderr=True, soft_wrap=True)
        errors.print("error:", style="bold red", end=" ")
        errors.print(str(error), markup=False, highlight=False)
        sys.exit(2)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))
