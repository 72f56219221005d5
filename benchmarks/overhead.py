"""What a policy costs: the time of a step under step-wise `auto_rgn`, over one of plain AdamW, in one run.

    python benchmarks/overhead.py

The quickstart's vision transformer on batches of 32 images, and a ViT-S/16 on 4, all of it trained. Optimizers of one
model take turns step by step, so that whatever else the machine does, and where weights lie in memory, meets all:
plain AdamW with Trainer's two groups; AdamW with the groups that `auto_rgn` needs, one for each block, and no policy;
the same with a hook that does no more than read: one `torch._foreach_norm` over all weights and gradients and one
transfer of the norms, of which nothing is made; and `auto_rgn`. The third is what PyTorch's own call costs any policy
that looks at the norms of all tensors before every step. Medians over the turns, of the time by the clock and of CPU
time, on which other processes weigh less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forward import vit, vit_s
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer

from surgical_peft import create_surgical_optimizer, policies

HEADER = (
    "| model | threads | AdamW | time | plain, ms | groups add, ms | reading adds, ms | auto_rgn adds, ms | groups "
    "| reading | auto_rgn |"
)


# What it is called, how it is made, images of a batch, and the share of the turns: the longer a step, the fewer.
CASES: list[tuple[str, Callable[[int], tuple[Any, dict[str, Any]]], int, float]] = [
    ("small ViT", vit, 32, 1.0),
    ("ViT-S/16", vit_s, 4, 0.05),
]


def optimizers(model: nn.Module, fused: bool) -> list[Optimizer]:
    """Plain AdamW, AdamW with a group for each block, that and a hook that reads norms, and that under `auto_rgn`."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    two = [{"params": [p for name, p in model.named_parameters() if (name in decayed) is on]} for on in (True, False)]
    ours = create_surgical_optimizer(model, AdamW, lr=1e-4, policy=policies.auto_rgn(), fused=fused)
    many = [{"params": group["params"]} for group in ours.param_groups]
    plain, grouped, reading = (
        AdamW(groups, lr=1e-4, weight_decay=0.0, fused=fused) for groups in (two, many, list(map(dict, many)))
    )
    weights: list[Any] = list(model.parameters())

    def read(*_: Any) -> None:
        with torch.no_grad():
            torch.stack(torch._foreach_norm(weights + [weight.grad for weight in weights])).tolist()

    reading.register_step_pre_hook(read)
    return [plain, grouped, reading, ours]


def measure(model: Any, batch: dict[str, Any], steps: int, fused: bool) -> dict[str, list[list[float]]]:
    """For either clock, the seconds of each optimizer's steps; every turn begins with another optimizer."""
    batch = {**batch, "labels": torch.arange(len(batch["pixel_values"])) % 2}
    ways = optimizers(model.train(), fused)
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
    lines = [HEADER, "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name, make, images, share in CASES:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for fused in (False, True):
                for clock, (plain, *ways) in measure(*make(images), round(share * steps), fused).items():
                    base = statistics.median(plain)
                    more = [statistics.median(b - a for a, b in zip(plain, way, strict=True)) for way in ways]
                    times = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (base, *more))
                    shares = " | ".join(f"{100 * seconds / base:.1f} %" for seconds in more)
                    kind = "fused" if fused else "default"
                    lines.append(f"| {name} | {threads} | {kind} | {clock} | {times} | {shares} |")
    lines.append(
        f"\nMedians of {steps} turns, {round(CASES[-1][-1] * steps)} for {CASES[-1][0]}; torch {torch.__version__}."
    )
    table = "\n".join(lines)
    print(table)
    Path(__file__).with_suffix(".md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
