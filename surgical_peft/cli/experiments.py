"""The commands that train many times: `surgical-peft search | compare | advise`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .options import AsJson, DryRun, RecipeFile, Tiny, console, in_words, print_json

if TYPE_CHECKING:
    from ..experiments.recipe.recipe import Recipe
    from ..experiments.search.search import CostEstimate as SearchCost


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
        typer.Option(help="Search procedure, instead of the recipe's: a name, or package.module:name."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the trainings.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Storage of the study; run the same command elsewhere with the same URL to help. sqlite:///, "
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
    from ..tuner.config import SurgicalConfig

    loaded, output = open_recipe(recipe, tiny, output)
    if procedure and procedure != loaded.procedure:
        loaded = replace(loaded, procedure=procedure, procedure_options={})
    if dry_run:
        _print_search_cost(plan(loaded, jobs), jobs, as_json)
        return
    name = name or f"{recipe.stem} {loaded.procedure}"
    result = search_recipe(loaded, output, jobs=jobs, storage=storage, name=name, console=_progress_console(as_json))
    if as_json:
        print_json(result.to_json())
        return
    console.print(result.table())
    console.print(f"Result: {_results_folder(loaded, output) / 'search'}")
    config = SurgicalConfig.from_selection(result.best)
    keys = {"target_modules": config.target_modules} if config.target_modules else {"blocks": config.blocks}
    if rate := result.best.record.get("rate"):
        keys["learning_rate"] = rate
    _print_recipe_lines([f"{key}: {json.dumps(value)}" for key, value in keys.items()])


def _print_search_cost(cost: SearchCost, jobs: int, as_json: bool) -> None:
    if as_json:
        print_json(asdict(cost))
        return
    most = "how many trainings is not known" if cost.trainings is None else f"at most {cost.trainings} trainings"
    console.print(f"{cost.procedure}: {most}.")
    console.print(f"One training of all layers, and few take longer: about {in_words(cost.seconds_each)}.")
    if cost.seconds is not None:
        console.print(f"With {jobs} job{'s' * (jobs > 1)}: at most about {in_words(cost.seconds)}.")


def _progress_console(as_json: bool) -> Console:
    return Console(stderr=True, quiet=True) if as_json else console


def _results_folder(recipe: Recipe, output: Path | None) -> Path:
    return Path(str(output or recipe.arguments().output_dir))


def _print_recipe_lines(lines: Sequence[str]) -> None:
    """Print the lines of a recipe for `surgical-peft train`."""
    console.print("To train it, write into the recipe:")
    for line in lines:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


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

    loaded, output = open_recipe(recipe, tiny, output)
    if dry_run:
        costs = plan(loaded, output, jobs)
        if as_json:
            print_json(asdict(costs))
            return
        console.print(f"{costs.trainings} trainings, of which {costs.done} are done.")
        console.print(f"At most {costs.more} more, where the best rate is at the edge of its grid.")
        console.print(f"One full fine-tuning: about {in_words(costs.seconds_each)}.")
        console.print(f"With {jobs} job{'s' * (jobs > 1)}: about {in_words(costs.seconds)}, choosing blocks apart.")
        return
    report = compare_recipe(loaded, output, jobs=jobs, console=_progress_console(as_json))
    if as_json:
        print_json(report.to_json())
        return
    console.print(table(report))
    for sentence in report.sentences:
        console.print(sentence, highlight=False)
    console.print(f"Result: {_results_folder(loaded, output) / 'comparison'}", soft_wrap=True)


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

    loaded, output = open_recipe(recipe, tiny, output)
    if dry_run:
        costs = plan(loaded)
        if as_json:
            print_json(asdict(costs))
            return
        console.print(f"{costs.trainings} short trainings.")
        console.print(f"One full fine-tuning: about {in_words(costs.seconds_each)}.")
        console.print(f"All: at most as {costs.full_trainings:.1f} of them, about {in_words(costs.seconds)}.")
        return
    advice = advise_on(loaded, output, console=_progress_console(as_json))
    if as_json:
        print_json(advice.to_json())
        return
    console.print(table(advice))
    for line in not_tried(advice):
        console.print(line, markup=False, highlight=False)
    for sentence in advice.sentences:
        console.print(sentence, highlight=False)
    if lines := recipe_lines(advice):
        _print_recipe_lines(lines)
    console.print(f"Result: {_results_folder(loaded, output) / 'advice'}", soft_wrap=True)
