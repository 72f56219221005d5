"""The command line.

`start | recipe | blocks | score | search | compare | advise | train | doctor | predict | export | patch | emit |
card | push | quickstart`
"""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from ..errors import SurgicalError
from .doctor import doctor
from .emit import emit
from .exits import errors_in_one_line, interrupts_in_one_line
from .experiments import advise, compare, open_recipe, search
from .options import AllowCode, AsJson, RecipeFile, console, print_json, print_lines
from .patch import patch
from .predict import predict
from .recipes import recipe, start
from .train import train

for _library in ("torchao", "bitsandbytes", "torch.utils._pytree", "DeepSpeed"):
    # What they say when they are imported is not about the command. Loggers below them have the level from them; one
    # of them sets its own then.
    logging.getLogger(_library).setLevel(logging.ERROR)
    logging.getLogger(_library).addFilter(lambda record: record.levelno >= logging.ERROR)

_RANK = 16  # of a LoRA made of an adapter


class _Commands(TyperGroup):
    """All commands; Ctrl-C ends each with one line and exit code 130."""

    def make_context(self, *given: Any, **kwargs: Any) -> Any:
        with interrupts_in_one_line():
            return super().make_context(*given, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with interrupts_in_one_line(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Fully fine-tune only the blocks of a transformer that new data need.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(help="The folder that `surgical-peft train` wrote.")]


class Command(TyperCommand):
    """A command that needs the library: it is imported when the command runs, not for `--help`."""

    def invoke(self, ctx: Any) -> Any:
        """Import and register, then do what the command does."""
        from ..quiet import quieten

        import_module("surgical_peft.api")  # registers the method with PEFT
        quieten()
        return super().invoke(ctx)


def _print_version(value: bool) -> None:
    if value:
        console.print(f"surgical-peft {version('surgical-peft')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fully fine-tune only the blocks of a transformer that new data need."""


@app.command()
def blocks(
    model: Annotated[str, typer.Argument(help="A model folder or a Hub id; only its config is read.")],
    as_json: AsJson = False,
) -> None:
    """List the blocks of a model: names, modules, parameters and their share."""
    from ..blocks.block_map import BlockMap, blocks_in_words
    from ..blocks.parts import parts_of
    from ..blocks.towers import names_of_towers
    from ..quiet import quieten
    from ..rendering import TextTable
    from .architectures import model_of_config

    quieten()
    network = model_of_config(model)
    block_map = BlockMap.find(network)
    sizes = {name: sum(p.numel() for p in group) for name, group in block_map.parameters(network).items()}
    total = sum(sizes.values())
    if as_json:
        keys = ("block", "modules", "parameters", "share")
        values = [(name, block_map.modules[name], size, size / total) for name, size in sizes.items()]
        print_json([dict(zip(keys, row, strict=True)) for row in values])
        return
    rows = [
        [blocks_in_words([name]), f"{size:,}", f"{size / total:.1%}", ", ".join(block_map.modules[name])]
        for name, size in sizes.items()
    ]
    title = f"{block_map.model_name}: {len(sizes)} blocks, {total:,} parameters"
    named = list(sizes)[-1]
    notes = [f'In recipes and SurgicalConfig: blocks: [0, -1, "0:3", {named}], by number, slice or name.']
    if towers := names_of_towers(block_map.modules):
        notes.append(f"Towers with all their blocks: {', '.join(towers)}.")
    if parts := parts_of(network, [path for name in block_map.layers for path in block_map.modules[name]]):
        notes.append(f"Parts of the repeated blocks, in target_modules: {', '.join(parts)}.")
    console.print(TextTable(title, ["block", "parameters", "share", "modules"], rows, notes, left=(0, 3)))


@app.command(cls=Command)
def score(
    recipe: RecipeFile,
    criterion: Annotated[
        str | None, typer.Option(help="Criterion, instead of the recipe's: a name, or package.module:name.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the scores to this file as well (png, pdf or svg).")] = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Score the blocks of a recipe's model on its training data."""
    from .. import criteria
    from ..experiments.training.questions import QUESTIONS
    from ..experiments.training.train import score as score_recipe
    from ..validation import resolve

    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        raise SurgicalError(f"--plot {str(plot)!r}: the name must end in .png, .pdf or .svg.")
    loaded, _ = open_recipe(recipe, allow_code)
    if criterion:
        resolve(criterion, criteria)  # an unknown name is said now, not after the data are loaded
        loaded = replace(loaded, criterion=criterion, criterion_options={})
    scores = score_recipe(loaded, Console(stderr=True, quiet=as_json))
    if plot:
        scores.plot(plot)
    if as_json:
        print_json(scores.to_json())
        return
    console.print(scores.table())
    print_lines([QUESTIONS["score"]])


app.command(cls=Command)(start)
app.command(cls=Command)(recipe)
app.command(cls=Command)(search)
app.command(cls=Command)(compare)
app.command(cls=Command)(advise)


app.command(cls=Command)(train)
app.command(cls=Command)(doctor)
app.command(cls=Command)(predict)


@app.command(cls=Command)
def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, or that of a delta.")],
    output: Annotated[Path, typer.Argument(help="A new or empty folder, or one of an earlier export.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft: for PEFT alone. merged: the whole model, for transformers alone. delta: what tuning changed, "
            "to the bit. patch: the tuned layers and their undo, for vLLM and `surgical-peft patch`. lora: a low rank "
            "of the change, for PEFT alone. adapter: back from a delta."
        ),
    ] = "peft",
    base: Annotated[
        str | None, typer.Option(help="The base model, a folder or a Hub id; default is what the adapter names.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help=f"Rank of the LoRA, for --format lora; default is {_RANK}.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in a form that others load; only --format lora takes an argument, --rank, and it has a default.

    Formats: peft, merged, delta, patch, lora, adapter.
    """
    from ..export.export import export as export_adapter
    from ..rendering import TextTable

    if rank is None and format == "lora":
        rank = _RANK
    report = export_adapter(adapter, output, format, base_model=base, rank=rank)
    if as_json:
        print_json(report)
        return
    if format == "lora":
        rows = [[name, f"{error:.2%}"] for name, error in {**report["error"], "all": report["total_error"]}.items()]
        note = "Lost: of what tuning changed in weights of Linear layers, by the Frobenius norm; lower is better."
        console.print(TextTable(f"LoRA of rank {rank}", ["module", "lost"], rows, [note]))
        console.print(f"{report['lora_modules']} modules as LoRA; kept whole: {len(report['whole_modules'])}.")
    if format == "delta":
        console.print(
            f"The weights take {report['delta_bytes']:,} bytes for {report['adapter_bytes']:,}: {report['ratio']:.2f} "
            f"times smaller ({report['planes_ratio']:.2f} without the base model)."
        )
    if format == "patch":
        lost = f", {report['rounded']} of them rounded to the checkpoint's dtype" if report["rounded"] else ""
        print_lines([f"{report['tensors']} weights of {', '.join(report['layers'])}{lost}; the same many in undo."])
    console.print(f"{output}: {report['bytes']:,} bytes of weights.")


app.command(cls=Command)(patch)
app.command(cls=Command)(emit)


@app.command(cls=Command)
def card(run: RunFolder, as_json: AsJson = False) -> None:
    """Write the model card of a training, from its report.json; `train` has done so, this does it again."""
    from ..experiments.training.card import write_card

    path = write_card(run)
    if as_json:
        print_json({"card": str(path)})
    else:
        console.print(f"Card: {path}", soft_wrap=True)


@app.command(cls=Command)
def push(
    run: RunFolder,
    repository: Annotated[str, typer.Argument(help="user/name on the Hub; there must be none of that name yet.")],
    public: Annotated[
        bool, typer.Option("--public/--private", help="Let everyone see it; unless you say so, only you do.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Put a trained adapter and its card on the Hub, as a private repository unless you say --public.

    The token is that of `hf auth login`.
    """
    from ..export.push import push as push_run

    pushed = push_run(run, repository, public=public)
    if as_json:
        print_json(asdict(pushed))
    else:
        access = "private" if pushed.private else "public"
        console.print(f"{pushed.repository} ({access}): {pushed.commit}", soft_wrap=True)
        if pushed.left_out:
            print_lines([f"Not pushed, as no part of an adapter: {', '.join(pushed.left_out)}."])


@app.command(cls=Command)
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("quickstart"),
    epochs: Annotated[float | None, typer.Option(min=0.1, help="Epochs of each training; default is 2.5.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show on real images which blocks matter, and what tuning only them gives; about 3 minutes on 2 cores."""
    from ..experiments.quickstart.quickstart import EPOCHS
    from ..experiments.quickstart.quickstart import quickstart as run_quickstart

    report = run_quickstart(output, Console(stderr=True, quiet=True) if as_json else console, epochs or EPOCHS)
    if as_json:
        print_json(report)


def main() -> None:
    """Run the command line; an error of ours is one line and exit code 2, unless `--debug` asks for the traceback."""
    sys.path.append(str(Path.cwd()))  # for a criterion or policy given as package.module:name
    with errors_in_one_line("--debug" in sys.argv):
        app([argument for argument in sys.argv[1:] if argument != "--debug"])  # it may stand anywhere
