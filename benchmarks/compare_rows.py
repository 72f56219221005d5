"""Trains some methods of a comparison again, and puts their rows into the report that is here.

    python benchmarks/compare_rows.py recipes/fashion_mnist_noise.yaml auto "top 2 by probe"

For when a change of the code touches what a few methods choose or train: the whole comparison takes an hour. The
methods named, by their titles in the table, and full fine-tuning are compared as the recipe says. Full fine-tuning has
to come out as in the report, to the digit; then the other rows would, too, and the new ones are put in their places,
with the step time by this run's full fine-tuning; date and versions stay those of the whole comparison. Methods that
the recipe has no more are dropped. Nothing is resumed: findings are known by their recipe, not by the code.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from surgical_peft.experiments.compare.compare import compare, write_report
from surgical_peft.experiments.compare.comparison import FULL, Comparison
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.experiments.compare.results import report_of
from surgical_peft.experiments.compare.tables import markdown
from surgical_peft.experiments.recipe import load_recipe

HERE = Path(__file__).parent / "compare"


def main() -> None:
    """Compare a few methods and write `report.json`, `table.md` and `compare.png` anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("methods", nargs="+", help="titles, as in the table")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    whole = Comparison(recipe)
    given = dict(zip(whole.methods, recipe.methods or (), strict=True))
    if unknown := [title for title in args.methods if title not in given]:
        sys.exit(f"{', '.join(unknown)}: no method of {args.recipe}. There are: {', '.join(given)}.")
    folder = HERE / args.recipe.stem.removeprefix("fashion_mnist_")
    old = ComparisonReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    rows = {row.method: row for row in old.methods}
    if missing := given.keys() - rows.keys() - {*args.methods}:
        sys.exit(f"{', '.join(missing)}: in the recipe, but not in the report; name them, too.")
    titles = dict.fromkeys([FULL, *args.methods])
    with tempfile.TemporaryDirectory() as output:
        new = compare(replace(recipe, methods=[given[title] for title in titles]), output)
    again = {row.method: row for row in new.methods}
    if again[FULL].test != rows[FULL].test:
        sys.exit(f"{FULL} gave {again[FULL].test}, the report has {rows[FULL].test}: compare all methods again.")
    for title in args.methods:
        ratio, of_full = again[title].ms_ratio, rows[FULL].ms
        rows[title] = replace(again[title], ms=ratio and of_full and ratio * of_full)
    report = report_of(whole, [rows[title] for title in given], 1, old.seconds)
    report = replace(report, date=old.date, versions=old.versions, machine=old.machine)
    write_report(report, folder)
    print(markdown(report))


if __name__ == "__main__":
    main()
