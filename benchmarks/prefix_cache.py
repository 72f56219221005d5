"""What the prefix cache saves at real sizes: an epoch of the last blocks over one of full fine-tuning, in one run.

    make real-data
    python benchmarks/prefix_cache.py data/real

The last 2 of 12 blocks of a ViT-S/14 and the last 4 of 30 of SmolLM2-135M, by AdamW in float32, on random images and
on random texts of 64 to 128 tokens, padded to the longest of a batch: time does not depend on what they are. Full
fine-tuning, the blocks without the cache and with it take turns epoch by epoch in one process on one thread; seconds
are of the process, not of the clock, so that others on the machine count little. An epoch of the cache is the median
of those after the first. Bytes are those that the cache held at the end, over what was predicted before.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from surgical_peft import SurgicalConfig, cache_prefix, get_surgical_model
from surgical_peft.prefix_cache.attach import predicted_bytes

Example = dict[str, Tensor]


def images(count: int) -> list[Example]:
    """Random images of the size that the ViT takes."""
    return [{"pixel_values": torch.randn(3, 112, 112), "labels": torch.randint(10, ())} for _ in range(count)]


def texts(count: int) -> list[Example]:
    """Random texts."""
    lengths = torch.linspace(64, 128, count).round().int().tolist()
    return [{"input_ids": torch.randint(100, 40_000, (length,))} for length in lengths]


def collate(rows: list[Example]) -> Example:
    """A batch; texts are padded on the right."""
    if "input_ids" not in rows[0]:
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ids = [row["input_ids"] for row in rows]
    padded = [nn.utils.rnn.pad_sequence(parts, True, fill) for parts, fill in ((ids, 0), (ids, -100))]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in ids], True)
    return {"input_ids": padded[0], "attention_mask": mask, "labels": padded[1]}


class Training:
    """One way to train a model, epoch by epoch."""

    def __init__(self, model: nn.Module, blocks: str | None, examples: list[Example], size: int, cached: bool) -> None:
        self.model = get_surgical_model(model, SurgicalConfig(blocks=blocks)) if blocks else model
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-5)
        order = torch.Generator().manual_seed(0)
        self.batches: DataLoader[Any] = DataLoader(examples, size, shuffle=True, generator=order, collate_fn=collate)  # type: ignore[arg-type]
        self.cache = cache_prefix(self.model, self.batches) if cached else None
        self.predicted = predicted_bytes(self.cache, self.batches) if self.cache else 0
        self.model.train()

    def epoch(self) -> float:
        """Train an epoch; returns its seconds."""
        began = time.process_time()
        for batch in self.batches:
            self.model(**batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - began


def rows_of(title: str, load: Any, blocks: str, examples: list[Example], size: int, epochs: int) -> list[str]:
    """The rows of one model."""
    ways = {"full": (None, False), "last": (blocks, False), "cached": (blocks, True)}
    runs = {name: Training(load(), *how[:1], examples, size, how[1]) for name, how in ways.items()}
    turns = [{name: run.epoch() for name, run in runs.items()} for _ in range(epochs)]
    full = statistics.median(turn["full"] for turn in turns)
    cache = runs["cached"].cache
    assert cache is not None
    held, predicted = cache.store.held + cache.store.written, runs["cached"].predicted
    pairs = zip(runs["last"].weights, runs["cached"].weights, strict=True)
    apart = max(float((one - other).abs().max()) for one, other in pairs)
    moved = max(float((one - other).abs().max()) for one, other in _moved(load, blocks, runs["cached"].weights))
    later = {name: [turn[name] / full for turn in turns[1:]] for name in runs}
    cells = [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" for ratios in later.values()]
    first = f"{turns[0]['cached'] / full:.2f}"
    sizes = f"{held / 1e6:.2f} | {held / predicted:.3f}"
    return [f"| {title} | {full:.1f} | {' | '.join(cells)} | {first} | {sizes} | {apart:.1e} | {moved:.1e} |"]


def _moved(load: Any, blocks: str, tuned: list[nn.Parameter]) -> Any:
    fresh = get_surgical_model(load(), SurgicalConfig(blocks=blocks))
    return zip((weight for weight in fresh.parameters() if weight.requires_grad), tuned, strict=True)


def main() -> None:
    """Print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that `make real-data` wrote")
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing")  # PEFT reads a deprecated name

    def vit() -> nn.Module:
        torch.manual_seed(0)  # its head is new
        return AutoModelForImageClassification.from_pretrained(
            given.data / "vit-s14", num_labels=10, dtype=torch.float32
        )

    def smollm2() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(given.data / "smollm2", dtype=torch.float32)

    lines = [
        "# Prefix cache",
        "",
        f"`python benchmarks/prefix_cache.py`, torch {torch.__version__}, one thread, {given.epochs} epochs.",
        "Columns of epochs are over one of full fine-tuning, the median and the range of those after the first.",
        "`apart` is how far weights with the cache are from those without at the end, at most, and `moved` how far",
        "they have come.",
        "",
        "| tuned | full, s | full | without | with the cache | its first epoch | MB | of predicted | apart | moved |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *rows_of("ViT-S/14, last 2 of 12 blocks", vit, "-2:", images(32), 16, given.epochs),
        *rows_of("SmolLM2-135M, last 4 of 30 blocks", smollm2, "-4:", texts(8), 4, given.epochs),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
