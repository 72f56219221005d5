"""What wrapping costs in the forward pass: a wrapped model's time over the bare one's, in one run.

    python benchmarks/forward.py

The quickstart's vision transformer, a Llama of 12 small blocks and a ViT-S/16, in eval mode, with one block and with
all of them tuned. Ours is measured twice: the `PeftModel` that a user calls, which does things of its own at each
call, and the base model inside it, which runs no code of ours. Beside it stand stock PEFT's own full copy of the same
modules, `modules_to_save`; and, as the control, a second bare model, whose ratio shows what is noise. All are copies
of one model around the same weights in memory: where things lie moves the time of a small model by more than wrapping
does.

A round builds all four anew. The five calls take turns, in random order, and a turn is several passes, so that a model
finds what it read last time in the cache, as it does in use. The ratio of a round is that of the lower quartiles of
its passes: what disturbs a pass makes it longer. The table shows the median of 20 rounds and, in brackets, the sixth
lowest to the sixth highest, which hold the true median with a probability of 96 %, however the rounds are distributed.
Time is CPU time of one thread, so that other processes count less, and no garbage is collected. `--rounds` takes
fewer, to see that it works.

Wrapping adds about the same microseconds to any pass, so the shortest pass, one small image, shows the largest ratio.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
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

MODEL = Path(__file__).parents[1] / "recipes" / "fashion_mnist" / "vit"


ROUNDS = 20


def vit(images: int) -> tuple[nn.Module, dict[str, Any]]:
    """The shipped model: 6 blocks."""
    model = AutoModelForImageClassification.from_pretrained(MODEL)
    size, channels = model.config.image_size, model.config.num_channels
    return model, {"pixel_values": torch.randn(images, channels, size, size)}


def llama(sequences: int) -> tuple[nn.Module, dict[str, Any]]:
    """12 blocks of width 256; sequences of 64 tokens."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 12}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=1000))
    return model, {"input_ids": torch.randint(3, 1000, (sequences, 64)), "use_cache": False}


def vit_s(images: int) -> tuple[nn.Module, dict[str, Any]]:
    """12 blocks of width 384, images of 224 x 224; the weights are random."""
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(images, 3, 224, 224)}


# What it is called, how it is made and for how many examples, the blocks to tune, and the turns of a round and the
# passes of a turn: the longer a pass takes, the less it scatters.
CASES: list[tuple[str, Callable[[int], tuple[nn.Module, dict[str, Any]]], int, list[int] | str, int, int]] = [
    ("small ViT, 1 image", vit, 1, [-1], 6, 8),
    ("small ViT, 1 image", vit, 1, "all", 6, 8),
    ("small ViT, 32 images", vit, 32, [-1], 8, 8),
    ("small ViT, 32 images", vit, 32, "all", 8, 8),
    ("Llama, 64 tokens", llama, 1, "all", 5, 2),
    ("ViT-S/16, 1 image", vit_s, 1, "all", 1, 1),
]


def sharing(model: nn.Module) -> nn.Module:
    """Another model around the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def stock(bare: nn.Module, paths: list[str]) -> PeftModel:
    """Stock PEFT's full copies of the modules at `paths`, around the same weights."""
    model = get_peft_model(sharing(bare), LoraConfig(target_modules="dummy-target-modules", modules_to_save=paths))
    for path in paths:
        wrapper = model.base_model.model.get_submodule(path)
        originals = dict(wrapper.original_module.named_parameters())
        for name, parameter in wrapper.modules_to_save["default"].named_parameters():
            parameter.data = originals[name].data
    return model


@torch.inference_mode()
def quartiles(models: list[nn.Module], inputs: dict[str, Any], turns: int, passes: int) -> list[float]:
    """The lower quartile of the seconds that each model's passes take."""

    def seconds(model: nn.Module) -> float:
        start = time.thread_time()
        model(**inputs)
        return time.thread_time() - start

    for model in models:
        seconds(model)
    found: list[list[float]] = [[] for _ in models]
    gc.collect()
    gc.disable()
    for _ in range(turns):
        for at in random.sample(range(len(models)), len(models)):
            found[at] += [seconds(models[at]) for _ in range(passes)]
    gc.enable()
    return torch.tensor(found, dtype=torch.float64).quantile(0.25, dim=1).tolist()


def compared(other: list[float], bare: list[float]) -> str:
    """The ratio of each round, as a cell: the median of them, and its interval."""
    ratios = sorted(b / a for a, b in zip(bare, other, strict=True))
    at = len(ratios) // 4
    return f"{statistics.median(ratios):.4f} ({ratios[at]:.4f} to {ratios[-1 - at]:.4f})"


def more(other: list[float], bare: list[float]) -> str:
    """The microseconds that `other` takes longer, as a cell."""
    return f"{1e6 * statistics.median(b - a for a, b in zip(bare, other, strict=True)):+.0f}"


def row(
    name: str,
    build: Callable[[int], tuple[nn.Module, dict[str, Any]]],
    size: int,
    blocks: list[int] | str,
    turns: int,
    passes: int,
    *,
    count: int = ROUNDS,
) -> str:
    """Measure one case in `count` rounds; its line of the table."""
    torch.manual_seed(0)
    random.seed(0)
    model, inputs = build(size)
    rounds = []
    for _ in range(count):
        bare, control = sharing(model).eval(), sharing(model).eval()
        ours = get_peft_model(sharing(model), SurgicalConfig(blocks=blocks, keep_base="none")).eval()
        paths = list(ours.peft_config["default"].tuned_modules)
        models = [bare, control, ours, ours.get_base_model(), stock(model, paths).eval()]
        rounds.append(quartiles(models, inputs, turns, passes))
    times, twin, mine, inner, theirs = (list(each) for each in zip(*rounds, strict=True))
    return (
        f"| {name} | {blocks if isinstance(blocks, str) else len(blocks)} | {1e3 * statistics.median(times):.2f} "
        f"| {compared(twin, times)} | {compared(mine, times)} | {compared(inner, times)} | {compared(theirs, times)} "
        f"| {more(mine, times)} | {more(inner, times)} | {more(theirs, times)} |"
    )


def main() -> None:
    """Print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    lines = [
        "| model | blocks wrapped | bare, ms | control / bare | ours / bare | ours, base model inside / bare "
        "| stock / bare | ours, µs more | inside | stock |",
        "| --- | --- | ---: | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for case in CASES:
        lines.append(row(*case, count=rounds))
        print(lines[-1], flush=True)
    lines.append(f"\n{rounds} rounds, one thread, torch {torch.__version__}. What each column is: `forward.py`.")
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
