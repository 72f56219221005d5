"""Demonstration on real images, `surgical-peft quickstart`: the blocks that matter differ with the shift.

The shipped Fashion-MNIST ViT meets two shifts: noise (the input changes) and a relabelling (the output changes).
Every method trains on three draws of 500 images at each rate of its grid; the rate is chosen by mean validation
accuracy over the draws, and only the runs at that rate are measured on the test images.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...atomic_files import check_replaceable, whole_folder
from ...scoring.block_scores import BlockScores
from ...scoring.plot import plot_scores
from ..compare.lr_grid import best_rate
from ..training.provenance import machine, today, versions
from ..training.workers import WorkerPool, shared_threads
from . import trials
from .tables import comparison_markdown, comparison_table
from .trials import METHODS, SHIFTS, Run

SEEDS = (0, 1, 2)
EPOCHS = 2.5
MARKER = "table.md"  # by which an earlier quickstart is known


def quickstart(
    output: str | Path = "quickstart",
    console: Console | None = None,
    epochs: float = EPOCHS,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Run the whole demonstration and write `report.json`, `table.md`, `scores.png` and `adapters/`.

    Args:
        output: folder for the results; replaced as a whole once all is done.
        console: where to print; default is the terminal.
        epochs: epochs of each training.
        seeds: which of the three draws of target images to use.

    Returns:
        The report, as written.

    Raises:
        SurgicalError: `output` holds something other than an earlier quickstart, the shipped files are missing, or a
            reloaded adapter does not give equal logits.
    """
    console = console or Console()
    began = time.perf_counter()
    check_replaceable(output, MARKER)
    trials.shipped("fashion_mnist/vit")
    workers = min(os.cpu_count() or 1, 8)
    with (
        tempfile.TemporaryDirectory() as temporary,
        shared_threads(os.cpu_count() or 1),  # one thread each, whatever the machine: the numbers do not depend on it
        WorkerPool(workers, console) as pool,
    ):
        work = Path(temporary)
        draws = [(shift, seed) for shift in SHIFTS for seed in seeds]
        pool.run("read images", trials.prepare, [(*draw, work) for draw in draws])
        scored = pool.run("score blocks", trials.score, [(shift, seeds[0]) for shift in SHIFTS])
        scores: dict[str, BlockScores] = dict(zip(SHIFTS, scored, strict=True))
        runs = [Run(*draw, name, rate, work) for draw in draws for name in METHODS for rate in METHODS[name].rates]
        trained = pool.run("train", trials.train, [(run, epochs) for run in runs])
        validation: dict[Run, float] = dict(zip(runs, trained, strict=True))
        chosen = runs_at_best_rates(validation)
        to_test = [Run(*draw, "no adaptation", 0.0, work) for draw in draws] + chosen
        tested = pool.run("test", trials.test, [(run,) for run in to_test])
        test: dict[Run, float] = dict(zip(to_test, tested, strict=True))
        costs = pool.run("time steps, alone", trials.costs, [(trials.data_of(*draws[0], work),)])[0]
        best = {shift: best_surgical_run(shift, chosen, validation) for shift in SHIFTS}
        with whole_folder(output, MARKER) as folder:
            adapters = {shift: folder / "adapters" / shift.replace(" ", "-") for shift in SHIFTS}
            for shift, run in best.items():
                shutil.copytree(run.folder, adapters[shift])
            pool.run("reload, new process", trials.check_reload, [(adapters[s], run) for s, run in best.items()])
            plot_scores(scores, folder / "scores.png")
            report = {
                "date": today(),
                "versions": versions(),
                "machine": f"{machine()}, {workers} single-threaded workers",
                "epochs": epochs,
                "seeds": list(seeds),
                "methods": [_row(name, chosen, validation, test, costs[name]) for name in METHODS],
                "scores": {shift: json.loads(each.to_json()) for shift, each in scores.items()},
                "adapters": {
                    shift: {"method": run.method, "seed": run.seed, "folder": str(adapters[shift].relative_to(folder))}
                    for shift, run in best.items()
                },
                "seconds": round(time.perf_counter() - began, 1),
            }
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (folder / MARKER).write_text(comparison_markdown(report), encoding="utf-8")
    _print(console, report, scores, Path(output))
    return report


def runs_at_best_rates(validation: dict[Run, float]) -> list[Run]:
    """For each shift and method the runs at the rate with the best mean validation accuracy; of equals the lower."""
    by_rate: dict[tuple[str, str], dict[float, list[Run]]] = {}
    for run in validation:
        by_rate.setdefault((run.shift, run.method), {}).setdefault(run.rate, []).append(run)
    chosen: list[Run] = []
    for rates in by_rate.values():
        means = {rate: statistics.mean(validation[run] for run in runs) for rate, runs in rates.items()}
        chosen += rates[best_rate(means)]
    return chosen


def best_surgical_run(shift: str, chosen: list[Run], validation: dict[Run, float]) -> Run:
    """The first draw's run of the surgical method with the best mean validation accuracy on `shift`."""
    runs: dict[str, list[Run]] = {}
    for run in chosen:
        if run.shift == shift and METHODS[run.method].is_surgical:
            runs.setdefault(run.method, []).append(run)
    return max(runs.values(), key=lambda draws: statistics.mean(validation[run] for run in draws))[0]


def _row(
    name: str, chosen: list[Run], validation: dict[Run, float], test: dict[Run, float], cost: dict[str, float]
) -> dict[str, Any]:
    shifts, size = {}, None
    for shift in SHIFTS:
        runs = [run for run in chosen if (run.shift, run.method) == (shift, name)]
        shifts[shift] = {
            "rate": runs[0].rate if runs else None,
            "validation": [validation[run] for run in runs],
            "test": [accuracy for run, accuracy in test.items() if (run.shift, run.method) == (shift, name)],
        }
        if runs:
            size = next(runs[0].folder.glob("*.safetensors")).stat().st_size
    return {"method": name, "parameters": cost["parameters"], "ms": cost.get("ms"), "bytes": size, "shifts": shifts}


def _print(console: Console, report: dict[str, Any], scores: dict[str, BlockScores], output: Path) -> None:
    for shift, each in scores.items():
        console.print(f"\n[bold]{shift}[/bold]")
        console.print(each.table())
    console.print(comparison_table(report))
    console.print(f"Scores as a picture: {output / 'scores.png'}")
    for shift, adapter in report["adapters"].items():
        console.print(
            f"Best surgical adapter on {shift} ({adapter['method']}): {output / adapter['folder']}, "
            "reloaded in a new process with equal logits"
        )
    console.print(f"All numbers: {output / 'report.json'} and {output / 'table.md'}")
    console.print(f"Total: {report['seconds']:.0f} s")
