"""The ground truth of the criteria: how well every single unit does when it alone is tuned.

    python benchmarks/criteria/truth.py [--only design|confirmation] [--shift NAME] [--together UNIT+UNIT]

Every (shift, seed, unit, rate) is trained once and appended to work/truth.jsonl; a rerun goes on where the last one
stopped. The end, and every rerun, writes truth.json: for each shift and unit the test accuracy at the rate with the
best mean validation accuracy. The rows "all" (full fine-tuning) and "none" stand beside the units. "sweep" is what one
would choose with these trainings of one draw alone: the unit, out of all and their rates, that is best on validation.

It needs one core. It also times full fine-tuning, by which the costs of criteria are counted; the seconds of single
units in truth.jsonl are smaller than a user's, since the frozen blocks below a unit are run only once (`prefix.py`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from prefix import Prefix
from shifts import SEEDS, SHIFTS, SPLITS, WORK, Split, Task, accuracy, load
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from surgical_peft import BlockMap, SurgicalConfig, create_surgical_optimizer

ROWS = WORK / "truth.jsonl"
TRUTH = Path(__file__).parent / "truth.json"
PACKAGES = ("torch", "transformers", "peft", "surgical-peft", "numpy")


@dataclass(frozen=True)
class Training:
    """How the shifts of one kind are trained; a rate falls linearly to 0.

    Attributes:
        epochs: through the training examples.
        batch_size: examples a step.
        rates: to choose from on validation.
        own_rates: the same for units that want others.
    """

    epochs: int
    batch_size: int
    rates: tuple[float, ...]
    own_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def rates_of(self, unit: str) -> tuple[float, ...]:
        """The rates that a row of the table tries."""
        return (0.0,) if unit == "none" else self.own_rates.get(unit, self.rates)


TRAININGS = {
    "image": Training(epochs=8, batch_size=32, rates=(1e-3, 3e-3, 1e-2)),
    # All three epochs and two rates because a mail costs a hundred times an image. The whole model wants lower rates
    # than a part of it, and the head, which is nearly free, higher ones.
    "mail": Training(
        epochs=3, batch_size=16, rates=(3e-4, 1e-3), own_rates={"all": (1e-4, 3e-4), "head": (1e-3, 3e-3, 1e-2)}
    ),
}


def batches(size: int, training: Training, seed: int) -> Iterator[torch.Tensor]:
    """The rows of each batch, shuffled anew in every epoch; the last batch of an epoch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(training.epochs):
        yield from torch.randperm(size, generator=generator).split(training.batch_size)


def fit(model: nn.Module, optimizer: Optimizer, split: Split, training: Training, seed: int) -> int:
    """Train a model; returns the number of steps."""
    torch.manual_seed(seed)  # dropout
    plan = list(batches(len(split["labels"]), training, seed))
    schedule = LambdaLR(optimizer, lambda step: 1 - step / len(plan))
    model.train()
    for rows in plan:
        model(**{name: values[rows] for name, values in split.items()}).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return len(plan)


def measure(task: Task, prefix: Prefix, unit: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one unit at one rate; the accuracies, and the seconds that the training alone took."""
    model, splits, steps, seconds = task.model(), {split: getattr(task, split) for split in SPLITS}, 0, 0.0
    if unit != "none":
        depth = prefix.depth(BlockMap.find(model).names, unit.partition("+")[0])
        model = model if unit == "all" else get_peft_model(model, SurgicalConfig(blocks=unit.split("+")))
        optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=rate)
        if depth:
            splits = prefix.cut(model, depth)
        start = time.perf_counter()
        steps = fit(model, optimizer, splits["train"], TRAININGS[task.kind], seed)
        seconds = time.perf_counter() - start
    accuracies = {split: accuracy(model, splits[split]) for split in ("validation", "test")}
    return {**accuracies, "seconds": round(seconds, 3), "steps": steps}


def read_rows() -> list[dict[str, Any]]:
    """What has been measured so far."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def run(shift: str, together: Sequence[str] = ()) -> None:
    """Measure what is still missing of a shift, and units tuned together such as `"0+head"`."""
    done = {(row["shift"], row["seed"], row["unit"], row["rate"]) for row in read_rows()}
    for seed in SEEDS:
        task = load(shift, seed)
        prefix = Prefix(task)
        units = ("none", "all", *BlockMap.find(task.model()).names, *together)
        plan = [(unit, rate) for unit in units for rate in TRAININGS[task.kind].rates_of(unit)]
        for unit, rate in plan:
            if (shift, seed, unit, rate) not in done:
                row = {
                    "shift": shift,
                    "seed": seed,
                    "unit": unit,
                    "rate": rate,
                    **measure(task, prefix, unit, rate, seed),
                }
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")  # in one piece, so that a kill leaves no half a row
                print(json.dumps(row), flush=True)


def summary(shift: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of one shift: for each unit the accuracies at the rate that validation chooses."""
    units: dict[str, Any] = {}
    for unit in dict.fromkeys(row["unit"] for row in rows):
        of_rate: dict[float, dict[str, list[float]]] = {}
        for rate in sorted({row["rate"] for row in rows if row["unit"] == unit}):
            seeds = sorted((r for r in rows if (r["unit"], r["rate"]) == (unit, rate)), key=lambda r: r["seed"])
            of_rate[rate] = {split: [row[split] for row in seeds] for split in ("validation", "test")}
        best = max(of_rate, key=lambda rate: statistics.mean(of_rate[rate]["validation"]))
        units[unit] = {
            "rate": best,
            "validation_mean": statistics.mean(of_rate[best]["validation"]),
            "test_mean": statistics.mean(of_rate[best]["test"]),
            "test_sd": statistics.stdev(of_rate[best]["test"]),
            "test": of_rate[best]["test"],
            "rates": {f"{rate:g}": accuracies for rate, accuracies in of_rate.items()},
        }
    full = [row for row in rows if row["unit"] == "all"]
    alone = [row for row in rows if row["unit"] not in ("none", "all") and "+" not in row["unit"]]
    of_seed = [[row for row in alone if row["seed"] == seed] for seed in SEEDS]
    return {
        **asdict(SHIFTS[shift]),
        "full_training_seconds": min(row["seconds"] for row in full),  # the others shared the machine with more
        "full_training_steps": full[0]["steps"],
        "units": units,
        "sweep": {
            "first": [max(each, key=lambda row: row["validation"])["unit"] for each in of_seed],
            "trainings": len(alone) / len(SEEDS),
        },
    }


def is_whole(shift: str, rows: list[dict[str, Any]]) -> bool:
    """Whether every unit of the shift has every rate and seed."""
    training = TRAININGS[SHIFTS[shift].kind]
    rates = sum(len(training.rates_of(unit)) for unit in {row["unit"] for row in rows})
    return bool(rows) and len(rows) == len(SEEDS) * rates


def write_truth() -> None:
    """Write what is whole to truth.json."""
    rows = read_rows()
    by_shift = {shift: [row for row in rows if row["shift"] == shift] for shift in SHIFTS}
    whole = [shift for shift, of_shift in by_shift.items() if is_whole(shift, of_shift)]
    truth = {
        "date": datetime.date.today().isoformat(),
        "versions": {package: version(package) for package in PACKAGES},
        "threads": 1,
        "trainings": {kind: asdict(training) for kind, training in TRAININGS.items()},
        "shifts": {shift: summary(shift, by_shift[shift]) for shift in whole},
    }
    TRUTH.write_text(json.dumps(truth, indent=2) + "\n")


def main() -> None:
    """Measure the chosen shifts and write truth.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("design", "confirmation"), help="default: both")
    parser.add_argument("--shift", choices=SHIFTS, help="default: all")
    parser.add_argument("--together", nargs="+", default=[], help="units to tune together, such as embeddings+0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, shift in SHIFTS.items():
        if args.only in (None, shift.group) and args.shift in (None, name):
            run(name, args.together)
            write_truth()


if __name__ == "__main__":
    main()
