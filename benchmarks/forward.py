"""What wrapping costs in the forward pass: a wrapped model's time over the bare one's, in one run.

    python benchmarks/forward.py

The quickstart's vision transformer and a Llama of 12 small blocks, in eval mode, with no block, one, two and all of
them wrapped; bare and wrapped take turns pass by pass. Medians of the paired ratios. Both use the same weights in
memory (`keep_base="none"` on a model that shares its parameters): where weights lie moves the time of a small model by
more than a wrapper does, as the row of a bare model and its copy shows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, LlamaConfig, LlamaForCausalLM

from surgical_peft import SurgicalConfig

MODEL = Path(__file__).parents[1] / "recipes" / "fashion_mnist" / "vit"


def vit() -> tuple[nn.Module, dict[str, Any]]:
    """The shipped model and 32 images."""
    model = AutoModelForImageClassification.from_pretrained(MODEL)
    size, channels = model.config.image_size, model.config.num_channels
    return model, {"pixel_values": torch.randn(32, channels, size, size)}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    """12 blocks of width 256, 4 sequences of 64 tokens."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 12}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000))
    return model, {"input_ids": torch.randint(3, 1000, (4, 64)), "use_cache": False}


def sharing(model: nn.Module) -> nn.Module:
    """Another model around the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.inference_mode()
def ratio(bare: nn.Module, wrapped: nn.Module, inputs: dict[str, Any], turns: int) -> float:
    """Median over pairs of passes of the wrapped one's time over the bare one's."""

    def seconds(model: nn.Module) -> float:
        start = time.perf_counter()
        model(**inputs)
        return time.perf_counter() - start

    for model in (bare, wrapped) * 5:
        seconds(model)
    pairs = [
        (seconds(bare), seconds(wrapped)) if turn % 2 else (seconds(wrapped), seconds(bare))[::-1]
        for turn in range(turns)
    ]
    return statistics.median(b / a for a, b in pairs)


def main() -> None:
    """Print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=200, help="pairs of forward passes")
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    models: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
        "ViT, 6 blocks": vit,
        "Llama, 12 blocks": llama,
    }
    lines = ["| model | blocks wrapped | forward pass, wrapped / bare |", "| --- | --- | ---: |"]
    for name, build in models.items():
        torch.manual_seed(0)
        bare, inputs = build()
        others = {"none: a copy of the bare model": copy.deepcopy(bare), "none": sharing(bare)}
        for blocks in ([-1], [0, -1], "all"):
            label = blocks if isinstance(blocks, str) else str(len(blocks))
            others[label] = get_peft_model(sharing(bare), SurgicalConfig(blocks=blocks, keep_base="none"))
        for label, other in others.items():
            lines.append(f"| {name} | {label} | {ratio(bare.eval(), other.eval(), inputs, turns):.4f} |")
    lines.append(f"\nMedian of {turns} pairs, one thread, torch {torch.__version__}.")
    table = "\n".join(lines)
    print(table)
    Path(__file__).with_suffix(".md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
