"""`surgical-peft quickstart`: on real images, which blocks matter under which shift, and what tuning only them gives.

The shipped Fashion-MNIST ViT meets two shifts: noise (the input changes) and a relabelling (the output changes). On
each, `compare` trains every method on three draws of 500 images, at the best rate of its grid; then the best surgical
one is trained as a recipe would be, saved, and loaded in a new process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

from .compare import compare
from .errors import SurgicalError
from .files import check_replaceable, whole_folder
from .recipe import Recipe
from .report.plots import plot_scores
from .report.tables import quickstart_markdown, quickstart_table
from .scores import BlockScores
from .tasks import load_task
from .train import score, train

SEEDS = (0, 1, 2)
EPOCHS = 2.5
MARKER = "table.md"  # by which an earlier quickstart is known
SHIFTS: dict[str, dict[str, Any]] = {
    "noise": {"corruption": "gaussian_noise", "severity": 5},
    "label map": {"label_map": list(range(9, -1, -1))},
}
METHODS = ["nothing", "full", "head", "first", "last", "auto_rgn", {"lora": {"rank": 8}}]
RATES = [1e-3, 3e-3, 1e-2]
# How a recipe says what the surgical ones of the methods do, and what the others leave alone.
SURGICAL: dict[str, dict[str, Any]] = {
    "head": {},
    "first third": {},
    "last third": {},
    "Auto-RGN": {"blocks": "all", "policy": "auto_rgn"},
}


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
        seeds: which of the five draws of target images to use.

    Returns:
        The report, as written.

    Raises:
        SurgicalError: `output` holds something other than an earlier quickstart, the shipped files are missing, or a
            reloaded adapter does not give equal logits.

    Example:
        >>> report = quickstart("quickstart")
        >>> report["adapters"]["label map"]["method"]
        'head'
    """
    console = console or Console()
    began = time.perf_counter()
    check_replaceable(output, MARKER)
    training = {"per_device_train_batch_size": 32, "num_train_epochs": epochs, "seed": seeds[0]}
    training |= {"disable_tqdm": True, "use_cpu": True}
    recipes = {shift: _recipe(shift, seeds[0], training) for shift in SHIFTS}
    draws = [str(shipped(f"fashion_mnist/target-{seed}")) for seed in seeds]
    grid: dict[str, Any] = {"methods": METHODS, "rates": RATES, "seeds": list(seeds), "draws": draws}
    jobs = min(os.cpu_count() or 1, 8)
    compared: dict[str, dict[str, Any]] = {}
    scores: dict[str, BlockScores] = {}
    adapters: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work, whole_folder(output, MARKER) as folder:
        for shift, recipe in recipes.items():
            console.print(f"[bold]{shift}[/bold]")
            scores[shift] = score(replace(recipe, criterion="rgn"))
            compared[shift] = compare(replace(recipe, **grid), Path(work) / shift, jobs=jobs, console=console)
            own = folder / "adapters" / shift.replace(" ", "-")
            best = best_surgical(compared[shift])
            chosen = {"blocks": best["blocks"][0], **SURGICAL[best["method"]]}
            train(replace(recipe, **chosen, training={**training, "learning_rate": best["rate"]}), own)
            check_reload(own / "adapter", recipe)
            adapters[shift] = {"method": best["method"], "seed": seeds[0], "folder": str(own.relative_to(folder))}
        plot_scores(scores, folder / "scores.png")
        report = {
            "date": compared["noise"]["date"],
            "versions": compared["noise"]["versions"],
            "machine": compared["noise"]["machine"],
            "epochs": epochs,
            "seeds": list(seeds),
            "methods": _rows(compared),
            "scores": {shift: json.loads(each.to_json()) for shift, each in scores.items()},
            "adapters": adapters,
            "seconds": round(time.perf_counter() - began, 1),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / MARKER).write_text(quickstart_markdown(report), encoding="utf-8")
    _print(console, report, scores, Path(output))
    return report


def best_surgical(report: dict[str, Any]) -> dict[str, Any]:
    """The row of the surgical method with the best mean validation accuracy in a comparison's report."""
    return max((row for row in report["methods"] if row["method"] in SURGICAL), key=lambda r: fmean(r["validation"]))


def shipped(name: str) -> Path:
    """A file or folder of `recipes/`: in the repository, or in the installed package.

    Raises:
        SurgicalError: it is in neither.
    """
    package = Path(__file__).parent
    for folder in (package.parent / "recipes", package / "shipped"):
        if (folder / name).exists():
            return folder / name
    raise SurgicalError(f"recipes/{name} did not come with this installation: run from a clone of the repository.")


_RELOAD = """
import sys, torch, surgical_peft
from transformers import AutoModelForImageClassification
adapter, folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForImageClassification.from_pretrained(adapter).eval()
batch = torch.load(f"{folder}/batch.pt")
with torch.inference_mode():
    sys.exit(0 if torch.equal(model(**batch).logits, torch.load(f"{folder}/logits.pt")) else 3)
"""


def check_reload(adapter: Path, recipe: Recipe) -> None:
    """Load `adapter` here and in a new Python process; accuracy and logits have to be those that are known.

    Here it has the accuracy on the test images that training reported, there the same logits to the last bit.

    Raises:
        SurgicalError: it does not load, or gives something else.
    """
    task = load_task(recipe, ("test",))
    model = PeftModel.from_pretrained(task.load_model(), adapter).eval()
    known = json.loads((adapter.parent / "report.json").read_text(encoding="utf-8"))["after"]["test"]
    found = task.measure(model, task.splits["test"])
    if found != known:
        raise SurgicalError(f"{adapter}, loaded again, has an accuracy of {found} on test images, not {known}.")
    batch = task.collate([task.splits["test"][place] for place in range(64)])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        torch.save(batch, f"{folder}/batch.pt")
        torch.save(model(**batch).logits, f"{folder}/logits.pt")
        command = [sys.executable, "-c", _RELOAD, str(adapter), folder, str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = "other logits than here" if done.returncode == 3 else done.stderr[-2000:]
        raise SurgicalError(f"{adapter}, loaded in a new process, gives {reason}")


def _recipe(shift: str, seed: int, training: dict[str, Any]) -> Recipe:
    model, data = shipped("fashion_mnist/vit"), shipped(f"fashion_mnist/target-{seed}")
    return Recipe(model=str(model), data=str(data), training=training, **SHIFTS[shift])


def _rows(compared: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method, with what it reached on every shift; what it costs is the same on all."""
    rows = []
    for each in zip(*(report["methods"] for report in compared.values()), strict=True):
        shifts = {
            shift: {key: row[key] for key in ("rate", "validation", "test")}
            for shift, row in zip(compared, each, strict=True)
        }
        costs = {"parameters": each[0]["tuned_parameters"][0], "ms": each[0]["ms"], "bytes": each[0]["bytes"][0]}
        rows.append({"method": each[0]["method"], **costs, "shifts": shifts})
    return rows


def _print(console: Console, report: dict[str, Any], scores: dict[str, BlockScores], output: Path) -> None:
    for shift, each in scores.items():
        console.print(f"\n[bold]{shift}[/bold]")
        console.print(each.table())
    console.print(quickstart_table(report))
    console.print(f"Scores as a picture: {output / 'scores.png'}")
    for shift, adapter in report["adapters"].items():
        console.print(
            f"Best surgical adapter on {shift} ({adapter['method']}): {output / adapter['folder'] / 'adapter'}, "
            "reloaded in a new process with equal logits"
        )
    console.print(f"All numbers: {output / 'report.json'} and {output / 'table.md'}")
    console.print(f"Total: {report['seconds']:.0f} s")
