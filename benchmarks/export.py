"""The forms of a tuned model: bytes of each, how much a delta saves, and what a LoRA of each rank loses.

    python benchmarks/export.py > benchmarks/export.md

Trains `recipes/label_map.yaml` (the last two blocks of the shipped vision transformer, float32) at its own learning
rate, a tenth and a hundredth of it. The bfloat16 rows hold the same two models, rounded. 4 minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.train import train
from surgical_peft.export.export import export

RECIPE = Path(__file__).parents[1] / "recipes" / "label_map.yaml"
RATES = (3e-3, 3e-4, 3e-5)
RANKS = (1, 2, 4, 8, 16, 32, 64)
WEIGHTS = "adapter_model.safetensors"


def in_bfloat16(adapter: Path, folder: Path) -> Path:
    """The adapter with its weights rounded."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def relative_change(adapter: Path, base: torch.nn.Module) -> float:
    """Norm of W - W0 over the norm of W0, over all tuned weights."""
    before = base.state_dict()
    tuned = {name.removeprefix("base_model.model."): value for name, value in load_file(adapter / WEIGHTS).items()}
    change = sum(float((value - before[name]).square().sum()) for name, value in tuned.items())
    return (change / sum(float(before[name].square().sum()) for name in tuned)) ** 0.5


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipe = load_recipe(RECIPE)
    task = load_task(recipe)
    base = task.load_model()
    deltas: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for rate in RATES:
            run = work / f"{rate}"
            training: dict[str, Any] = {**recipe.training, "learning_rate": rate}
            with contextlib.redirect_stdout(sys.stderr):
                report = train(replace(recipe, training=training), run)
            moved = relative_change(run / "adapter", base)
            for dtype, source in (
                ("float32", run / "adapter"),
                ("bfloat16", in_bfloat16(run / "adapter", run / "rounded")),
            ):
                said = export(source, run / f"delta-{dtype}", "delta", base_model=copy.deepcopy(base))
                deltas.append(
                    f"| {rate:g} | {report.after['test']:.1%} | {moved:.2f} | {dtype} "
                    f"| {said['adapter_bytes']:,} | {said['delta_bytes']:,} | {said['ratio']:.2f} "
                    f"| {said['planes_ratio']:.2f} |"
                )
        adapter = work / f"{RATES[0]}" / "adapter"
        whole = task.measure(PeftModel.from_pretrained(copy.deepcopy(base), adapter), task.splits["test"])
        print(f"# Forms of one tuned model\n\n`python benchmarks/export.py`, {RECIPE.name}\n")
        print("| format | bytes of weights |\n| --- | ---: |")
        print(f"| adapter | {(adapter / WEIGHTS).stat().st_size:,} |")
        for name in ("peft", "merged", "delta"):
            print(f"| {name} | {export(adapter, work / name, name)['bytes']:,} |")
        print(f"| lora, rank 8 | {export(adapter, work / 'lora', 'lora', rank=8)['bytes']:,} |")
        print("\n`peft` is the adapter's own file under a stock config. What a delta saves:\n")
        print("| learning rate | test | norm(W - W0) / norm(W0) | dtype | weights | delta | ratio | without base |")
        print("| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
        print("\n".join(deltas))
        print(
            "\n`without base`: byte planes of W itself, compressed. Bytes are those of the weights; the file's header "
            "adds some\n300 a tensor. What a LoRA loses (learning rate 3e-3; norms are kept whole, biases exactly):\n"
        )
        print("| rank | lost of W - W0 (Frobenius) | bytes | test accuracy |\n| ---: | ---: | ---: | ---: |")
        for rank in RANKS:
            said = export(adapter, work / "lora", "lora", rank=rank)
            model = PeftModel.from_pretrained(copy.deepcopy(base), work / "lora")
            reached = task.measure(model, task.splits["test"])
            print(f"| {rank} | {said['total_error']:.1%} | {said['bytes']:,} | {reached:.1%} |")
        size = (adapter / WEIGHTS).stat().st_size
        print(
            f"| adapter | 0 | {size:,} | {whole:.1%} |\n"
            f"| base | all | 0 | {task.measure(base, task.splits['test']):.1%} |"
        )


if __name__ == "__main__":
    main()
