"""What wrapping costs in the forward pass: a wrapped model's time over the bare one's, in one run.

    python benchmarks/forward.py

The quickstart's vision transformer with 32 images, a Llama of 12 small blocks and a ViT-B/16 with one image, in eval
mode, with one block, two and all of them wrapped; the same by stock PEFT's own full copy, `modules_to_save`. They take
turns pass by pass; medians over the turns. Time is CPU time, on one thread: other processes count less.
All use the same weights in memory: where weights lie moves the time of a small model by more than a wrapper does, as
the row of a bare model and its copy shows.
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
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from surgical_peft import SurgicalConfig
from surgical_peft.layer import SurgicalLayer

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


def vit_b() -> tuple[nn.Module, dict[str, Any]]:
    """12 blocks of width 768, one image of 224 x 224; the weights are random."""
    return ViTForImageClassification(ViTConfig()), {"pixel_values": torch.randn(1, 3, 224, 224)}


# Turns of the large one take 20 times as long, and scatter less.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], int]] = {
    "ViT, 6 blocks": (vit, 1),
    "Llama, 12 blocks": (llama, 1),
    "ViT-B/16, 12 blocks": (vit_b, 8),
}


def sharing(model: nn.Module) -> nn.Module:
    """Another model around the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def stock(bare: nn.Module, like: PeftModel) -> PeftModel:
    """Stock PEFT's full copies of the modules that `like` wraps, around the same weights."""
    paths = [name for name, module in like.base_model.model.named_modules() if isinstance(module, SurgicalLayer)]
    model = get_peft_model(sharing(bare), LoraConfig(target_modules="dummy-target-modules", modules_to_save=paths))
    for path in paths:
        wrapper = model.base_model.model.get_submodule(path)
        originals = dict(wrapper.original_module.named_parameters())
        for name, parameter in wrapper.modules_to_save["default"].named_parameters():
            parameter.data = originals[name].data
    return model


@torch.inference_mode()
def measure(models: list[nn.Module], inputs: dict[str, Any], turns: int) -> list[list[float]]:
    """Seconds of each model at each turn; every turn begins with another of them."""

    def seconds(model: nn.Module) -> float:
        start = time.thread_time()
        model(**inputs)
        return time.thread_time() - start

    for model in models * 5:
        seconds(model)
    found: list[list[float]] = [[] for _ in models]
    for turn in range(turns):
        for place in range(len(models)):
            at = (turn + place) % len(models)
            found[at].append(seconds(models[at]))
    return found


def compared(other: list[float], bare: list[float]) -> str:
    """The median ratio, and the median of what it takes longer, as two cells."""
    ratio = statistics.median(b / a for a, b in zip(bare, other, strict=True))
    more = statistics.median(b - a for a, b in zip(bare, other, strict=True))
    return f"{ratio:.4f} | {1e3 * more:+.3f}"


def main() -> None:
    """Print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=300, help="forward passes of each model; of ViT-B an eighth")
    asked = parser.parse_args().turns
    torch.set_num_threads(1)
    lines = [
        "| model | bare, ms | blocks wrapped | ours / bare | ours, ms more | stock / bare | stock, ms more |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, (build, fewer) in MODELS.items():
        torch.manual_seed(0)
        turns = asked // fewer
        bare, inputs = build()
        bare.eval()
        times, twin = measure([bare, copy.deepcopy(bare)], inputs, turns)
        first = f"| {name} | {1e3 * statistics.median(times):.1f} |"
        lines.append(f"{first} none: a copy of the bare model | {compared(twin, times)} | | |")
        for blocks in ([-1], [0, -1], "all"):
            label = blocks if isinstance(blocks, str) else str(len(blocks))
            ours = get_peft_model(sharing(bare), SurgicalConfig(blocks=blocks, keep_base="none"))
            times, mine, theirs = measure([bare, ours.eval(), stock(bare, ours).eval()], inputs, turns)
            first = f"| {name} | {1e3 * statistics.median(times):.1f} | {label} |"
            lines.append(f"{first} {compared(mine, times)} | {compared(theirs, times)} |")
    lines.append(f"\nMedians of {asked} turns ({asked // 8} of ViT-B/16), one thread, torch {torch.__version__}.")
    table = "\n".join(lines)
    print(table)
    Path(__file__).with_suffix(".md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
