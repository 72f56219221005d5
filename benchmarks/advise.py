"""Is `surgical-peft advise` right on shifts that it was not developed on?

    python benchmarks/advise.py                 # all recipes of benchmarks/advise, and their table
    python benchmarks/advise.py pixelate        # one of them
    python benchmarks/advise.py --table         # the table of what is there

For each recipe the advice is asked for once, on one draw; then `surgical-peft compare` trains all candidates in full
on three draws. Advice is right if the recommended row's mean test metric is within one standard deviation (that of the
best row over the draws) of the best row. What is done already is not done again; it lies in runs/advise/, and a shift
that was measured elsewhere keeps its row.

Needs the extra `shifts` (`make install` has it), and `make mail` for the mails.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from surgical_peft.experiments.advise.advise import advise
from surgical_peft.experiments.compare.compare import compare
from surgical_peft.experiments.quickstart.tables import mean_and_spread
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.quiet import quieten

HERE = Path(__file__).parent / "advise"
RUNS = Path("runs/advise")


def main() -> None:
    """Run what is not done, and write the table."""
    recipes = sorted(path.stem for path in HERE.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*recipes, []], metavar="NAME", help=", ".join(recipes))
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the trainings of a comparison")
    parser.add_argument("--advice", action="store_true", help="only ask for the advice, compare later")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    quieten()
    for name in [] if given.table else given.names or recipes:
        recipe = load_recipe(HERE / f"{name}.yaml")
        if not (RUNS / name / "advice" / "advice.json").exists():
            advise(recipe, RUNS / name)
        if not given.advice and not (RUNS / name / "comparison" / "report.json").exists():
            compare(recipe, RUNS / name, jobs=given.jobs)
    kept = {row["shift"]: row for row in json.loads((HERE / "advise.json").read_text())}
    rows = [row for name in recipes if (row := judged(name) or kept.get(name))]
    (HERE / "advise.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "table.md").write_text(markdown(rows))


def judged(name: str) -> dict[str, Any] | None:
    """The advice on a shift beside what a comparison found; None while one of them is missing."""
    paths = RUNS / name / "advice" / "advice.json", RUNS / name / "comparison" / "report.json"
    if not all(path.exists() for path in paths):
        return None
    advice, report = (json.loads(path.read_text()) for path in paths)
    tests = {row["method"]: row["test"] for row in report["methods"]}
    best = max(tests, key=lambda title: statistics.fmean(tests[title]))
    recommended = advice["recommended"]["title"]
    behind = statistics.fmean(tests[best]) - statistics.fmean(tests[recommended])
    return {
        "shift": name,
        "recommended": recommended,
        "surgery": advice["surgery"],
        "best": best,
        "behind": behind,
        "right": behind <= statistics.stdev(tests[best]),
        "tests": tests,
        "signature": advice["signature"]["kind"],
        "full_trainings": advice["cost"]["full_trainings"],
        "date": report["date"],
        "versions": report["versions"],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, with what it says in one line."""
    lines = [
        f"Right on {sum(row['right'] for row in rows)} of {len(rows)} held-out shifts.",
        "",
        "| shift | advice | its test, % | best | its test, % | full, % | as it is, % | right | signature | cost |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | --- | --- | ---: |",
    ]
    for row in rows:
        shown = {title: mean_and_spread(values) for title, values in row["tests"].items()}
        cells = [row["shift"].replace("_", " "), row["recommended"], shown[row["recommended"]]]
        cells += [row["best"], shown[row["best"]], shown["full fine-tuning"], shown["no adaptation"]]
        cells += ["yes" if row["right"] else "**no**", f"{row['signature']} moved", f"{row['full_trainings']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Test accuracy: mean ± standard deviation of three draws, each method at its best rate, by `surgical-peft "
        "compare`; the advice saw the first of these draws alone, and no test data. Right: within one standard "
        "deviation of the best row from the best row. Cost: of the advice, in full fine-tunings, all included.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
