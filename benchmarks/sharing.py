"""What the trainings of a sweep cost when they share data, model and frozen prefix: wall time by that from scratch.

    python benchmarks/sharing.py

Each candidate of the sweep on noise is trained once in each way, in turns, in one process: from scratch (data loaded,
decoded, corrupted and normalized as `Trainer` asks for them, model read from disk) and by the objective of a search.
What the objective makes once is in its time. The table goes to `benchmarks/sharing.md`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from surgical_peft import Selection, SurgicalConfig, get_surgical_model, procedures
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.search.objective import RecipeObjective
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.train import fit
from surgical_peft.quiet import quieten

ROOT = Path(__file__).parent


def from_scratch(recipe: Recipe, blocks: tuple[str, ...], rate: float, seed: int) -> float:
    """Validation accuracy of one training that shares nothing."""
    task = load_task(recipe, ("train", "validation"))
    model = get_surgical_model(task.load_model(), SurgicalConfig(blocks=list(blocks)))
    args = recipe.arguments(disable_tqdm=True, learning_rate=rate, seed=seed)
    fit(model, args, task.splits["train"], collate=task.collate)
    return task.measure(model, task.splits["validation"])


def main() -> None:
    """Time both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT.parent / "recipes" / "sweep_noise.yaml")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quieten()
    recipe = load_recipe(options.recipe)
    began = time.perf_counter()
    objective = RecipeObjective(recipe)
    preparing = time.perf_counter() - began
    candidates = next(procedures.sweep("all")(objective.blocks))
    settings = objective.rates[0], objective.seeds[0]
    from_scratch(recipe, candidates[-1], *settings)  # what is imported on the way is imported now
    lines = [
        "| tuned | from scratch, s | shared, s | ratio | accuracy, scratch | shared |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    totals = [0.0, preparing]
    for blocks in candidates:
        began = time.perf_counter()
        alone = from_scratch(recipe, blocks, *settings)
        middle = time.perf_counter()
        shared = objective(Selection(blocks), *settings)
        ended = time.perf_counter()
        seconds = middle - began, ended - middle
        totals = [total + each for total, each in zip(totals, seconds, strict=True)]
        name = "all" if len(blocks) > 1 else blocks[0]
        lines.append(
            f"| {name} | {seconds[0]:.1f} | {seconds[1]:.1f} | {seconds[1] / seconds[0]:.2f} "
            f"| {alone:.3f} | {shared:.3f} |"
        )
        print(lines[-1], flush=True)
    lines.append(f"| **the sweep** | {totals[0]:.1f} | {totals[1]:.1f} | **{totals[1] / totals[0]:.2f}** | | |")
    text = "\n".join(lines) + (
        "\n\nThe first shared training also fills the prefix cache. "
        f"{recipe.training['num_train_epochs']} epochs of 500 images, {options.threads} thread, "
        f"torch {torch.__version__}.\n"
    )
    (ROOT / "sharing.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
