"""What a policy costs: the time of a step under step-wise `auto_rgn`, over one of plain AdamW, in one run.

    python benchmarks/overhead.py

The quickstart's vision transformer, all of it trained, batches of 32 images. The two take turns step by step, so that
whatever else the machine does meets both; the table gives medians of `--steps` turns, for 1 and 2 threads and for the
two kinds of AdamW. `auto_rgn` itself is compared, with the parameter groups that it needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification, Trainer

from surgical_peft import create_surgical_optimizer, policies
from surgical_peft.policies.policy import Policy

MODEL = Path(__file__).parents[1] / "recipes" / "fashion_mnist" / "vit"


def stepper(policy: Policy | None, fused: bool) -> Callable[[], float]:
    """A function that trains one step and gives its seconds; `policy=None` is torch's own AdamW."""
    model = AutoModelForImageClassification.from_pretrained(MODEL).train()
    if policy is None:
        decayed = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
        named = list(model.named_parameters())
        groups = [{"params": [p for name, p in named if (name in decayed) is on]} for on in (True, False)]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0, fused=fused)
    else:
        optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-4, policy=policy, fused=fused)
    size, channels = model.config.image_size, model.config.num_channels
    batch = {"pixel_values": torch.randn(32, channels, size, size), "labels": torch.arange(32) % 10}

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def measure(steps: int, fused: bool) -> tuple[float, float]:
    """Median seconds of a plain step, and of what a step under the policy takes longer than the plain one by it."""
    plain, ours = stepper(None, fused), stepper(policies.auto_rgn(), fused)
    for warm_up in (plain, ours) * 5:
        warm_up()
    pairs = [(plain(), ours()) if turn % 2 else (ours(), plain())[::-1] for turn in range(steps)]
    return statistics.median(a for a, _ in pairs), statistics.median(b - a for a, b in pairs)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    print("| threads | AdamW | plain, ms | auto_rgn adds, ms | overhead |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for fused in (False, True):
            plain, more = measure(steps, fused)
            kind = "fused" if fused else "default"
            print(f"| {threads} | {kind} | {1e3 * plain:.1f} | {1e3 * more:.2f} | {100 * more / plain:.1f} % |")


if __name__ == "__main__":
    main()
