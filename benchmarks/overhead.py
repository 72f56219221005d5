"""What a policy costs: the time of a step under step-wise `auto_rgn`, over one of plain AdamW, in one run.

    python benchmarks/overhead.py

The quickstart's vision transformer, all of it trained, batches of 32 images. Three optimizers of one model take turns
step by step, so that whatever else the machine does, and where weights lie in memory, meets all: plain AdamW with
Trainer's two groups; AdamW with the groups that `auto_rgn` needs, one for each block, and no policy; and `auto_rgn`.
The second is the floor for any policy with rates by block. Medians over the turns, of the time by the clock and of
CPU time, on which other processes weigh less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForImageClassification, Trainer

from surgical_peft import create_surgical_optimizer, policies

MODEL = Path(__file__).parents[1] / "recipes" / "fashion_mnist" / "vit"
HEADER = "| threads | AdamW | time | plain, ms | groups add, ms | auto_rgn adds, ms | groups | overhead |"


def optimizers(model: torch.nn.Module, fused: bool) -> list[Optimizer]:
    """Plain AdamW, AdamW with a group for each block, and that under `auto_rgn`."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    two = [{"params": [p for name, p in model.named_parameters() if (name in decayed) is on]} for on in (True, False)]
    ours = create_surgical_optimizer(model, AdamW, lr=1e-4, policy=policies.auto_rgn(), fused=fused)
    many = [{"params": group["params"]} for group in ours.param_groups]
    return [*(AdamW(groups, lr=1e-4, weight_decay=0.0, fused=fused) for groups in (two, many)), ours]


def measure(steps: int, fused: bool) -> dict[str, list[list[float]]]:
    """For either clock, the seconds of each optimizer's steps; every turn begins with another optimizer."""
    model = AutoModelForImageClassification.from_pretrained(MODEL).train()
    size, channels = model.config.image_size, model.config.num_channels
    batch = {"pixel_values": torch.randn(32, channels, size, size), "labels": torch.arange(32) % 10}
    ways = optimizers(model, fused)
    found: dict[str, list[list[float]]] = {clock: [[] for _ in ways] for clock in ("clock", "CPU")}
    for turn in range(steps + 5):
        for place in range(len(ways)):
            at = (turn + place) % len(ways)
            start, used = time.perf_counter(), time.process_time()
            ways[at].zero_grad()
            model(**batch).loss.backward()
            ways[at].step()
            if turn >= 5:
                found["CPU"][at].append(time.process_time() - used)
                found["clock"][at].append(time.perf_counter() - start)
    return found


def main() -> None:
    """Print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of each optimizer")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    lines = [HEADER, "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for fused in (False, True):
            for clock, (plain, groups, ours) in measure(steps, fused).items():
                base = statistics.median(plain)
                more = [statistics.median(b - a for a, b in zip(plain, way, strict=True)) for way in (groups, ours)]
                times = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (base, *more))
                shares = " | ".join(f"{100 * seconds / base:.1f} %" for seconds in more)
                lines.append(f"| {threads} | {'fused' if fused else 'default'} | {clock} | {times} | {shares} |")
    lines.append(f"\nMedians of {steps} turns, torch {torch.__version__}.")
    table = "\n".join(lines)
    print(table)
    Path(__file__).with_suffix(".md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
