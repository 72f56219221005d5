"""The commands that train many times: `surgical-peft search | compare | advise`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..tuner.config import SurgicalConfig
from .options import AsJson, DryRun, RecipeFile, Tiny, console, in_words, print_json

if TYPE_CHECKING:
    from ..experiments.recipe.recipe import Recipe


def open_recipe(path: Path, tiny: bool, output: Path | None) -> tuple[Recipe, Path | None]:
    """The recipe in a file and the folder for its results; with `tiny` one that needs no network, said plainly."""
    from ..experiments.recipe import load_recipe

    recipe = load_recipe(path)
    if not tiny:
        return recipe, output
    from ..experiments.training.tiny import NOTICE, make_tiny

    Console(stderr=True).print(NOTICE, style="bold yellow")
    return make_tiny(recipe, output), None


def search(
    recipe: RecipeFile,
    procedure: Annotated[
        str | None,
        typer.Option(help="What to try, instead of the recipe's procedure: a name, or package.module:name."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the trainings.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where the study is kept; run the same command elsewhere with the same URL to help. sqlite:///, "
            "journal:/// or postgresql+psycopg://; default is study.db in the output folder.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the study; default is that of the recipe and the procedure.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default is the recipe's.")] = None,
    dry_run: DryRun = False,
    tiny: Tiny = False,
    as_json: AsJson = False,
) -> None:
    """Find the blocks to tune by trying them; the same command again resumes."""
    from ..experiments.search.search import plan
    from ..experiments.search.search import search as search_recipe

    found, output = open_recipe(recipe, tiny, output)
    if procedure and procedure != found.procedure:
        found = replace(found, procedure=procedure, procedure_options={})
    if dry_run:
        costs = plan(found, jobs)
        if as_json:
            print_json(asdict(costs))
            return
        most = "how many trainings is not known" if costs.trainings is None else f"at most {costs.trainings} trainings"
        console.print(f"{costs.procedure}: {most}.")
        console.print(f"One training of all layers, and few take longer: about {in_words(costs.seconds_each)}.")
        if costs.seconds is not None:
            console.print(f"With {jobs} job{'s' * (jobs > 1)}: at most about {in_words(costs.seconds)}.")
        return
    result = search_recipe(
        found,
        output,
        jobs=jobs,
        storage=storage,
        name=name or f"{recipe.stem} {found.procedure}",
        console=Console(stderr=True, quiet=True) if as_json else console,
    )
    if as_json:
        print_json(result.to_json())
        return
    console.print(result.table())
    folder = Path(str(output or found.arguments().output_dir)) / "search"
    console.print(f"Result: {folder}")
    rate = result.best.record.get("rate")
    config = SurgicalConfig.from_selection(result.best)
    said = {"target_modules": config.target_modules} if config.target_modules else {"blocks": config.blocks}
    said |= {"learning_rate": rate} if rate else {}
    console.print("To train it, write into the recipe:")
    for key, value in said.items():
        console.print(f"  {key}: {json.dumps(value)}", markup=False, highlight=False, soft_wrap=True)


def compare(
    recipe: RecipeFile,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the trainings.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default is the recipe's.")] = None,
    dry_run: DryRun = False,
    tiny: Tiny = False,
    as_json: AsJson = False,
) -> None:
    """Compare a recipe's methods, each at its best rate, with full fine-tuning; the same command again resumes."""
    from ..experiments.compare.compare import compare as compare_recipe
    from ..experiments.compare.compare import plan
    from ..experiments.compare.tables import table

    found, output = open_recipe(recipe, tiny, output)
    if dry_run:
        costs = plan(found, output, jobs)
        if as_json:
            print_json(asdict(costs))
            return
        console.print(f"{costs.trainings} trainings, of which {costs.done} are done.")
        console.print(f"At most {costs.more} more, where the best rate is at the edge of its grid.")
        console.print(f"One full fine-tuning: about {in_words(costs.seconds_each)}.")
        console.print(f"With {jobs} job{'s' * (jobs > 1)}: about {in_words(costs.seconds)}, choosing blocks apart.")
        return
    report = compare_recipe(found, output, jobs=jobs, console=Console(stderr=True, quiet=True) if as_json else console)
    if as_json:
        print_json(report.to_json())
        return
    console.print(table(report))
    for sentence in report.sentences:
        console.print(sentence, highlight=False)
    console.print(f"Result: {Path(str(output or found.arguments().output_dir)) / 'comparison'}", soft_wrap=True)


def advise(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default is the recipe's.")] = None,
    dry_run: DryRun = False,
    tiny: Tiny = False,
    as_json: AsJson = False,
) -> None:
    """Say which blocks to tune on a recipe's data, or that surgery is not for it, after a few short trainings."""
    from ..experiments.advise.advise import advise as advise_on
    from ..experiments.advise.advise import plan
    from ..experiments.advise.report import not_tried, recipe_lines, table

    found, output = open_recipe(recipe, tiny, output)
    if dry_run:
        costs = plan(found)
        if as_json:
            print_json(asdict(costs))
            return
        console.print(f"{costs.trainings} short trainings.")
        console.print(f"One full fine-tuning: about {in_words(costs.seconds_each)}.")
        console.print(f"All: at most as {costs.full_trainings:.1f} of them, about {in_words(costs.seconds)}.")
        return
    advice = advise_on(found, output, console=Console(stderr=True, quiet=True) if as_json else console)
    if as_json:
        print_json(advice.to_json())
        return
    console.print(table(advice))
    for line in not_tried(advice):
        console.print(line, markup=False, highlight=False)
    for sentence in advice.sentences:
        console.print(sentence, highlight=False)
    if lines := recipe_lines(advice):
        console.print("To train it, write into the recipe:")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Result: {Path(str(output or found.arguments().output_dir)) / 'advice'}", soft_wrap=True)
