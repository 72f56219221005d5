"""Which criterion finds the right block? Every criterion against the ground truth of truth.json.

    python benchmarks/criteria/run.py [--only design|confirmation] [--shift NAME] [--criterion NAME ...]

For every shift and seed each criterion scores the units on the training split alone. Judged are, against the test
accuracy of tuning each unit alone (truth.py): the rank correlation (Spearman), the regret (points of accuracy between
the best unit and the one that the criterion puts first; and the better one of the first two), and the cost (seconds of
scoring by those of one full fine-tuning, both measured in this run, taking turns). Finished (shift, seed, criterion)
are lines of work/scores.jsonl and never scored again; the end writes criteria.json and table.md.

Two more rows say what the figures are worth. A sweep trains every unit alone, in full and at each rate, and takes the
best one on validation data, as truth.py has it: what one can do without a criterion, at the cost of dozens of
trainings. And one may take the last layer, whatever the shift.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from scipy.stats import spearmanr
from shifts import SEEDS, SHIFTS, WORK, Task, load, loader
from truth import TRAININGS, TRUTH

from surgical_peft import criteria, score_blocks

ROWS = WORK / "scores.jsonl"
FOLDER = TRUTH.parent
TIMED_STEPS = 5  # of full fine-tuning, from which the time of a whole one is told


def full_training_seconds(task: Task, seed: int) -> float:
    """Seconds of one full fine-tuning, told from a few of its steps."""
    training = TRAININGS[task.kind]
    size = len(task.train["labels"])
    batches = -(-size // training.batch_size)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    seconds = []
    for batch in (loader(task.train, training.batch_size, seed) * TIMED_STEPS)[:TIMED_STEPS]:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * batches * training.epochs


def score(shift: str, seed: int, names: Iterable[str]) -> None:
    """Score what is missing of one shift and seed."""
    done = {(row["shift"], row["seed"], row["criterion"]) for row in read_rows()}
    missing = [name for name in names if (shift, seed, name) not in done]
    if not missing:
        return
    task = load(shift, seed)
    batches = loader(task.train, TRAININGS[task.kind].batch_size, seed)
    model = task.model()
    for name in missing:
        training = full_training_seconds(task, seed)
        start = time.perf_counter()
        criterion = partial(criteria.random, seed=seed) if name == "random" else name  # another draw of it, too
        scores = score_blocks(model, batches, criterion)
        seconds = time.perf_counter() - start
        row = {
            "shift": shift,
            "seed": seed,
            "criterion": name,
            "batches": scores.num_batches,
            "values": scores.values,
            "trainings": seconds / training,
        }
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(shift, seed, name, f"{seconds / training:.3f} trainings", flush=True)


def read_rows() -> list[dict[str, Any]]:
    """What has been scored so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def judged(rows: list[dict[str, Any]], truth: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each shift how the rows of one criterion did, averaged over the seeds."""
    found: dict[str, dict[str, Any]] = {}
    seeds = Counter(row["shift"] for row in rows)
    for shift in (shift for shift, count in seeds.items() if count == len(SEEDS)):
        accuracy = accuracies(truth[shift])
        of_shift = [row for row in rows if row["shift"] == shift]
        rankings = [sorted(row["values"], key=lambda unit: -row["values"][unit]) for row in of_shift]
        best = max(accuracy.values())
        found[shift] = {
            "correlation": statistics.mean(
                spearmanr([row["values"][unit] for unit in ranking], [accuracy[unit] for unit in ranking]).statistic
                for row, ranking in zip(of_shift, rankings, strict=True)
            ),
            "regret": regret(accuracy, [ranking[0] for ranking in rankings]),
            "regret_of_two": 100
            * statistics.mean(best - max(accuracy[u] for u in ranking[:2]) for ranking in rankings),
            "first": [ranking[0] for ranking in rankings],
            "trainings": statistics.mean(row["trainings"] for row in of_shift),
        }
    return found


def accuracies(of_shift: dict[str, Any]) -> dict[str, float]:
    """The test accuracy of each single unit."""
    return {
        unit: each["test_mean"]
        for unit, each in of_shift["units"].items()
        if unit not in ("all", "none") and "+" not in unit
    }


def regret(accuracy: dict[str, float], first: list[str]) -> float:
    """Points that the first choices of all seeds lose on average."""
    return 100 * statistics.mean(max(accuracy.values()) - accuracy[unit] for unit in first)


def without_a_criterion(truth: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a sweep chooses, and the last layer, judged as criteria are."""
    found: dict[str, dict[str, Any]] = {"a sweep": {}, "the last layer": {}}
    for shift, of_shift in truth.items():
        accuracy = accuracies(of_shift)
        last = max((unit for unit in accuracy if unit.isdigit()), key=int)
        for name, each in (
            ("a sweep", of_shift["sweep"]),
            ("the last layer", {"first": [last] * len(SEEDS), "trainings": 0.0}),
        ):
            found[name][shift] = {"regret": regret(accuracy, each["first"]), **each}
    return found


def write_results() -> None:
    """Write criteria.json and table.md of what is whole."""
    truth = json.loads(TRUTH.read_text())["shifts"]
    rows = [row for row in read_rows() if row["shift"] in truth]
    names = [name for name in criteria.__all__ if any(row["criterion"] == name for row in rows)]
    results = {name: judged([row for row in rows if row["criterion"] == name], truth) for name in names}
    references = without_a_criterion(truth)
    (FOLDER / "criteria.json").write_text(json.dumps(results | references, indent=2) + "\n")
    table: list[list[str]] = []
    left_out: dict[str, None] = {}
    for name, by_shift in (results | references).items():
        missing = [shift for shift in truth if shift not in by_shift]
        left_out.update(dict.fromkeys(missing))
        cells = [f"`{name}`" + (" \\*" if missing else "") if name in results else name]
        for group in ("design", "confirmation"):
            of_group = [each for shift, each in by_shift.items() if SHIFTS[shift].group == group]
            for key, digits in (("correlation", 2), ("regret", 1), ("regret_of_two", 1)):
                values = [each[key] for each in of_group if key in each]
                cells.append(f"{statistics.mean(values):.{digits}f}" if values else "-")
        trainings = statistics.mean(each["trainings"] for each in by_shift.values())
        cells.append(f"{trainings:.2f}" if name in results else f"{trainings:.0f}")
        table.append(cells)
    figures = ("correlation", "regret", "of two")
    header = ["criterion", *figures, *(f"{figure}, unseen" for figure in figures), "trainings"]
    table.sort(key=lambda cells: float(cells[2]))
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *table]
    seen, unseen = (
        ", ".join(shift for shift in truth if SHIFTS[shift].group == group) for group in ("design", "confirmation")
    )
    numbers = ", ".join(f"{package} {version(package)}" for package in ("surgical-peft", "torch", "transformers"))
    today = datetime.date.today().isoformat()
    foot = (
        f"Means over {len(SEEDS)} draws and the shifts {seen}; unseen while criteria were developed: {unseen}. "
        "Correlation: Spearman, of scores with the test accuracy of each block tuned alone. Regret: points of "
        "accuracy between the best block and the one scored highest, or the better of the two scored highest. "
        "Trainings: time of scoring by that of one full fine-tuning. A sweep tunes every block alone at each rate and "
        f"takes the best one on validation data: so many trainings. {today}, {numbers}; one CPU thread."
    )
    if left_out:
        foot += f" \\*: not run on {', '.join(left_out)}."
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{foot}\n"
    (FOLDER / "table.md").write_text(text)
    print(text)


def main() -> None:
    """Score the chosen shifts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("design", "confirmation"), help="default: both")
    parser.add_argument("--shift", choices=SHIFTS, help="default: all")
    parser.add_argument("--criterion", nargs="+", choices=criteria.__all__, default=criteria.__all__)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, shift in SHIFTS.items():
        if args.only in (None, shift.group) and args.shift in (None, name):
            for seed in SEEDS:
                score(name, seed, args.criterion)
    write_results()


if __name__ == "__main__":
    main()
