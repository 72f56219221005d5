"""The commands that train many times: `surgical-peft search | compare | advise`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .options import AllowCode, AsJson, DryRun, RecipeFile, Tiny, console, print_json, print_lines

if TYPE_CHECKING:
    from ..experiments.recipe.recipe import Recipe


def open_recipe(
    path: Path, allow_code: bool, tiny: bool = False, output: Path | None = None, dry_run: bool = False
) -> tuple[Recipe, Path | None]:
    """The recipe in a file and the folder for its results; with `tiny` one that needs no network.

    That, and which code the recipe brings, is said plainly; with `dry_run` it is left without its code.
    """
    from ..experiments.recipe import load_recipe
    from ..experiments.recipe.code import for_dry_run, told

    notes = Console(stderr=True, soft_wrap=True)
    recipe = load_recipe(path, allow_code=allow_code)
    recipe, lines = for_dry_run(recipe) if dry_run else (recipe, told(recipe))
    for line in lines:
        notes.print(line, style="bold yellow", markup=False, highlight=False)
    if not tiny:
        return recipe, output
    from ..experiments.training.tiny import NOTICE, make_tiny

    notes.print(NOTICE, style="bold yellow")
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
    allow_code: AllowCode = False,
    tiny: Tiny = False,
    as_json: AsJson = False,
) -> None:
    """Find the blocks to tune by trying them; the same command again resumes."""
    from ..experiments.search.search import noise_of, plan
    from ..experiments.search.search import search as search_recipe
    from ..experiments.training.questions import QUESTIONS
    from ..tuner.config import SurgicalConfig

    loaded, output = open_recipe(recipe, allow_code, tiny, output, dry_run)
    if procedure and procedure != loaded.procedure:
        loaded = replace(loaded, procedure=procedure, procedure_options={})
    if dry_run:
        _print_cost(plan(loaded, jobs, console=_notes(as_json)), as_json)
        return
    name = name or f"{recipe.stem} {loaded.procedure}"
    result = search_recipe(loaded, output, jobs=jobs, storage=storage, name=name, console=_progress_console(as_json))
    if as_json:
        print_json(result.to_json())
        return
    console.print(result.table())
    print_lines([*noise_of(result), QUESTIONS["search"]])
    console.print(f"Result: {_results_folder(loaded, output) / 'search'}")
    config = SurgicalConfig.from_selection(result.best)
    keys = {"target_modules": config.target_modules} if config.target_modules else {"blocks": config.blocks}
    if rate := result.best.record.get("rate"):
        keys["learning_rate"] = rate
    _print_recipe_lines([f"{key}: {json.dumps(value)}" for key, value in keys.items()])


def _print_cost(cost: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(cost))
    else:
        print_lines(cost.lines())


def _notes(as_json: bool) -> Console:
    return Console(stderr=True, quiet=as_json)


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
    allow_code: AllowCode = False,
    tiny: Tiny = False,
    as_json: AsJson = False,
) -> None:
    """Compare a recipe's methods, each at its best rate, with full fine-tuning; the same command again resumes.

    Without methods in the recipe: nothing, full, head, first, middle, last, lora and auto, those that fit the model.
    Others: auto_rgn, auto_rgn_paper, blocks, bvg_ls, layer_decay, lp_ft, modules_to_save, norms, policy, random_k,
    searched, top_k, or your own, package.module:name.
    """
    from ..experiments.compare.compare import compare as compare_recipe
    from ..experiments.compare.compare import plan
    from ..experiments.compare.default_methods import with_default_methods
    from ..experiments.compare.tables import table
    from ..experiments.training.questions import QUESTIONS

    loaded, output = open_recipe(recipe, allow_code, tiny, output, dry_run)
    if not loaded.methods:
        loaded, left_out = with_default_methods(loaded)
        notes = _notes(as_json)
        notes.print(f"No methods in the recipe, so: {json.dumps(loaded.methods)}.", markup=False, highlight=False)
        for why in left_out.values():
            notes.print(f"Left out: {why}", markup=False, highlight=False)
    if dry_run:
        costs = plan(loaded, output, jobs, console=_notes(as_json))
        _print_cost(costs, as_json)
        return
    report = compare_recipe(loaded, output, jobs=jobs, console=_progress_console(as_json))
    if as_json:
        print_json(report.to_json())
        return
    console.print(table(report))
    print_lines([*report.sentences, QUESTIONS["compare"]])
    console.print(f"Result: {_results_folder(loaded, output) / 'comparison'}", soft_wrap=True)


def advise(
    recipe: RecipeFile,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; default is the recipe's.")] = None,
    max_forgetting: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="What the mean loss on the recipe's source_data may rise by, such as 0.05; default is any amount.",
        ),
    ] = None,
    dry_run: DryRun = False,
    allow_code: AllowCode = False,
    tiny: Tiny = False,
    as_json: AsJson = False,
) -> None:
    """Say which blocks to tune on a recipe's data, or that surgery is not for it, after a few short trainings."""
    from ..experiments.advise.advise import advise as advise_on
    from ..experiments.advise.advise import plan
    from ..experiments.advise.report import not_tried, recipe_lines, table
    from ..experiments.training.questions import QUESTIONS

    loaded, output = open_recipe(recipe, allow_code, tiny, output, dry_run)
    if dry_run:
        costs = plan(loaded, max_forgetting=max_forgetting, console=_notes(as_json))
        _print_cost(costs, as_json)
        return
    advice = advise_on(loaded, output, max_forgetting=max_forgetting, console=_progress_console(as_json))
    if as_json:
        print_json(advice.to_json())
        return
    console.print(table(advice))
    print_lines([*not_tried(advice), *advice.sentences, QUESTIONS["advise"]])
    if lines := recipe_lines(advice):
        _print_recipe_lines(lines)
    console.print(f"Result: {_results_folder(loaded, output) / 'advice'}", soft_wrap=True)
