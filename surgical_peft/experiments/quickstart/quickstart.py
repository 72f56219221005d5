"""Demonstration on real images, `surgical-peft quickstart`: the blocks that matter differ with the shift.

The shipped Fashion-MNIST ViT meets two shifts: noise (the input changes) and a relabelling (the output changes). Each
is a comparison, as `surgical-peft compare` makes it: three draws of 500 images, each rate of one grid, the best by
mean validation accuracy; only the trainings at that rate are measured on the test images.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...atomic_files import check_replaceable, whole_folder
from ...errors import SurgicalError
from ...scoring.block_scores import BlockScores
from ...scoring.plot import plot_scores
from ..compare.compare import measured_rows
from ..compare.comparison import Comparison
from ..compare.jobs import JobRunner
from ..compare.methods.method import tune_blocks
from ..compare.pool import JobPool
from ..compare.report import MethodRow
from ..recipe.recipe import Recipe
from ..training.provenance import machine, today, versions
from ..training.train import score
from ..training.workers import shared_threads
from .tables import comparison_markdown, comparison_table

SEEDS = (0, 1, 2)
EPOCHS = 2.5
RATES = [1e-3, 3e-3, 1e-2]  # one grid for all
SHIFTS: dict[str, dict[str, Any]] = {
    "noise": {"corruption": "gaussian_noise", "severity": 5},
    "label map": {"label_map": list(range(9, -1, -1))},
}
METHODS: dict[str, Any] = {  # by their names in the table, as a recipe has them
    "no adaptation": "nothing",
    "full fine-tuning": "full",
    "head": "head",
    "first (embeddings, 0, 1)": {"blocks": {"names": ["embeddings", 0, 1]}},
    "last (4, 5)": {"blocks": {"names": [4, 5]}},
    "Auto-RGN, all blocks": {"policy": {"name": "auto_rgn", "blocks": "all"}},
    "LoRA r=8": {"lora": {"head": False}},
}
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
    recipes = {shift: _recipe(shift, epochs, seeds) for shift in SHIFTS}
    workers = min(os.cpu_count() or 1, 8)
    with (
        tempfile.TemporaryDirectory() as temporary,
        shared_threads(os.cpu_count() or 1),  # one thread each, whatever the machine: the numbers do not depend on it
        JobPool(workers, console) as pool,
        whole_folder(output, MARKER) as folder,
    ):
        scored = pool.run("score blocks", score, [(recipe,) for recipe in recipes.values()])
        scores: dict[str, BlockScores] = dict(zip(SHIFTS, scored, strict=True))
        plot_scores(scores, folder / "scores.png")
        rows: dict[str, dict[str, MethodRow]] = {}
        adapters: dict[str, dict[str, Any]] = {}
        for shift, recipe in recipes.items():
            console.print(f"[bold]{shift}[/bold]")
            work = Path(temporary, shift)
            job_runner = JobRunner(Comparison(recipe), work, work / "examples")
            measured = measured_rows(job_runner, pool, is_extended=False)
            rows[shift] = dict(zip(METHODS, measured, strict=True))
            method, row = best_surgical(rows[shift], job_runner.comparison)
            place = Path("adapters", shift.replace(" ", "-"))
            _save_adapter(job_runner, row, folder / place)
            adapters[shift] = {"method": method, "seed": seeds[0], "folder": str(place)}
        checks = [(folder / adapter["folder"], Path(temporary)) for adapter in adapters.values()]
        pool.run("reload, new process", check_reload, checks)
        report = {
            "date": today(),
            "versions": versions(),
            "machine": f"{machine()}, {workers} single-threaded workers",
            "epochs": epochs,
            "seeds": list(seeds),
            "methods": [_entry(name, {shift: rows[shift][name] for shift in SHIFTS}) for name in METHODS],
            "scores": {shift: json.loads(each.to_json()) for shift, each in scores.items()},
            "adapters": adapters,
            "seconds": round(time.perf_counter() - began, 1),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / MARKER).write_text(comparison_markdown(report), encoding="utf-8")
    _print(console, report, scores, Path(output))
    return report


def shipped(name: str) -> Path:
    """A file or folder of `recipes/`: in the repository, or in the installed package.

    Raises:
        SurgicalError: it is in neither.
    """
    package = Path(__file__).parents[2]
    for folder in (package.parent / "recipes", package / "shipped"):
        if (folder / name).exists():
            return folder / name
    raise SurgicalError(f"recipes/{name} did not come with this installation: run from a clone of the repository.")


def _recipe(shift: str, epochs: float, seeds: Sequence[int]) -> Recipe:
    draws = [str(shipped(f"fashion_mnist/target-{seed}")) for seed in seeds]
    return Recipe(
        model=str(shipped("fashion_mnist/vit")),
        data=draws[0],
        draws=draws,
        seeds=list(seeds),
        methods=list(METHODS.values()),
        rates=RATES,
        criterion="rgn",
        training={
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 32,
            "seed": seeds[0],
            "disable_tqdm": True,
            "use_cpu": True,
        },
        **SHIFTS[shift],
    )


def best_surgical(rows: dict[str, MethodRow], comparison: Comparison) -> tuple[str, MethodRow]:
    """The surgical method with the best mean validation accuracy, and its row."""
    surgical = [name for name, row in rows.items() if comparison.methods[row.method].wrap is tune_blocks]
    best = max(surgical, key=lambda name: statistics.fmean(value or 0.0 for value in rows[name].validation))
    return best, rows[best]


def _save_adapter(job_runner: JobRunner, row: MethodRow, folder: Path) -> None:
    """Save the adapter of the first draw, trained once more, and beside the work images with its logits of them."""
    job = job_runner.comparison.trainings(row.method, row.rate)[0]
    model, runner = job_runner.train(job), job_runner.data.runner(job)
    model.save_pretrained(folder)  # type: ignore[operator]
    images = runner.task.collate([runner.examples["validation"][index] for index in range(64)])["pixel_values"]
    with torch.inference_mode():
        logits = model.eval()(pixel_values=images).logits
    torch.save((images, logits), job_runner.findings.folder.parent / f"{folder.name}.pt")


_RELOAD = """
import sys, torch, surgical_peft
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
adapter, known = sys.argv[1:]
images, logits = torch.load(known)
with torch.inference_mode():
    again = AutoModelForImageClassification.from_pretrained(adapter).eval()(pixel_values=images).logits
sys.exit(0 if torch.equal(again, logits) else 3)
"""


def check_reload(adapter: Path, work: Path) -> None:
    """Load `adapter` in a fresh Python process and compare logits with those of the trained model, bit for bit.

    Raises:
        SurgicalError: it does not load, or the logits differ.
    """
    command = [sys.executable, "-c", _RELOAD, str(adapter), str(work / f"{adapter.name}.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = "other logits than when it was saved" if done.returncode == 3 else done.stderr[-2000:]
        raise SurgicalError(f"the adapter {adapter.name}, loaded in a new process, gives {reason}")


def _entry(name: str, rows: dict[str, MethodRow]) -> dict[str, Any]:
    """A row of the report: of the steps of both comparisons the mean counts."""
    *_, row = rows.values()
    times = [row.ms for row in rows.values() if row.ms is not None]
    return {
        "method": name,
        "parameters": row.tuned_parameters[0],
        "ms": statistics.fmean(times) if times else None,
        "bytes": row.bytes[0],
        "shifts": {
            shift: {"rate": row.rate, "validation": row.validation, "test": row.test} for shift, row in rows.items()
        },
    }


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
