"""What each recipe of one training gives on three draws: the expected numbers in the headers of `recipes/`.

    python benchmarks/recipes.py                # all of them, and their table: 6 minutes on one core
    python benchmarks/recipes.py noise rgn      # these, and the table of what is there

A recipe is trained as `surgical-peft train` does it, on the first three draws of its data, each with its own seed.
What is done already is not done again; it lies in runs/recipes/, and a row that was measured elsewhere is kept. Needs
`make mail` for the mails.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgical_peft.experiments.quickstart.tables import mean_and_spread
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.train import train
from surgical_peft.quiet import quieten

HERE = Path(__file__).parent
RUNS = Path("runs/recipes")
DRAWS = 3
PATHS = {path.stem: path for path in sorted((HERE.parent / "recipes").glob("*.yaml"))}
# A row more of these, with something else in place: what the recipe's own way is worth.
INSTEAD: dict[str, dict[str, dict[str, Any]]] = {
    "imbalance_two_stages": {"one stage, plain loss": {"policy": None, "policy_options": {}}},
}


def rows_of() -> list[str]:
    """The names of all rows: the recipes that neither search nor compare, and what is in place of some."""
    keys = {name: load_recipe(path).keys() for name, path in PATHS.items()}
    names = [name for name, given in keys.items() if "methods" not in given and "procedure" not in given]
    return [row for name in names for row in (name, *(f"{name}, {other}" for other in INSTEAD.get(name, {})))]


def recipe_of(row: str, draw: int) -> Recipe:
    """The recipe of a row on a draw, with the draw's number as its seed."""
    name, _, other = row.partition(", ")
    recipe = load_recipe(PATHS[name])
    data = f"{recipe.data.removesuffix('-0')}-{draw}"
    recipe = replace(recipe, data=data, training={**recipe.training, "seed": draw})
    if other:
        recipe = replace(recipe, **INSTEAD[name][other])
    if "counts" in recipe.policy_options:  # of the training images, which another draw has others of
        examples = load_task(recipe, ("train",)).splits["train"]
        counts = Counter(int(examples[place]["labels"]) for place in range(len(examples)))
        own = [counts[label] for label in range(len(counts))]
        recipe = replace(recipe, policy_options={**recipe.policy_options, "counts": own})
    return recipe


def result(row: str) -> dict[str, Any] | None:
    """What a row's trainings gave; None while one is missing."""
    paths = [RUNS / row / str(draw) / "report.json" for draw in range(DRAWS)]
    if not all(path.exists() for path in paths):
        return None
    reports = [json.loads(path.read_text()) for path in paths]
    return {
        "recipe": row,
        "metric": reports[0]["metric"],
        "before": [each["before"]["test"] for each in reports],
        "after": [each["after"]["test"] for each in reports],
        "blocks": [each["blocks"] for each in reports],
        "tuned_parameters": [each["tuned_parameters"] for each in reports],
        "all_parameters": reports[0]["all_parameters"],
        "date": reports[-1]["date"],
        "versions": reports[-1]["versions"],
    }


def markdown(rows: list[Mapping[str, Any]]) -> str:
    """The table."""
    lines = ["| recipe | before | after | each draw | tuned |", "| --- | ---: | ---: | --- | ---: |"]
    for row in rows:
        each = ", ".join(f"{100 * value:.1f}" for value in row["after"])
        before, after = 100 * statistics.fmean(row["before"]), mean_and_spread(row["after"])
        tuned = statistics.fmean(row["tuned_parameters"]) / row["all_parameters"]
        lines.append(f"| {row['recipe']} | {before:.1f} | {after} | {each} | {100 * tuned:.1f} % |")
    lines.append(
        "\nTest accuracy in %: mean ± standard deviation of three draws, each with a seed of its own. Tuned: of the "
        "parameters. The rate is the recipe's, which was not chosen for the one stage under the plain loss."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not done, and write the table."""
    every = rows_of()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*(row for row in every if "," not in row), []], metavar="NAME")
    given = parser.parse_args()
    quieten()
    for row in every:
        if given.names and row.partition(", ")[0] not in given.names:
            continue
        for draw in range(DRAWS):
            folder = RUNS / row / str(draw)
            if not (folder / "report.json").exists():
                train(recipe_of(row, draw), folder)
    kept = {row["recipe"]: row for row in json.loads((HERE / "recipes.json").read_text())}
    rows = [found for row in every if (found := result(row) or kept.get(row))]
    (HERE / "recipes.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "recipes.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
