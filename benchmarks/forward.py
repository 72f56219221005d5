"""What wrapping costs in the forward pass: a wrapped model's time over the bare one's, in one run.

    python benchmarks/forward.py

The quickstart's vision transformer, a Llama of 12 small blocks and a ViT-S/16, in eval mode, with one block and with
all of them wrapped. Beside it stand stock PEFT's own full copy, `modules_to_save`; the least that a wrapper can be: it
calls what it wraps, in a PeftModel, and can do nothing else; and, as the control, a second bare model, whose ratio
shows what is noise. All are copies of one model around the same weights in memory: where things lie moves the time of
a small model by more than a wrapper does.

A round builds all five anew. They take turns, in random order, and a turn is several passes, so that a model finds
what it read last time in the cache, as it does in use. The ratio of a round is that of the lower quartiles of its
passes: what disturbs a pass makes it longer. The table shows the median of 20 rounds and, in brackets, the sixth
lowest to the sixth highest, which hold the true median with a probability of 96 %, however the rounds are distributed.
Time is CPU time of one thread, so that other processes count less, and no garbage is collected.

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
from surgical_peft.layer import SurgicalLayer

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


# What it is called, how it is made and for how many examples, the blocks to wrap, and the turns of a round and the
# passes of a turn: the longer a pass takes, the less it scatters.
CASES: list[tuple[str, Callable[[int], tuple[nn.Module, dict[str, Any]]], int, list[int] | str, int, int]] = [
    ("small ViT, 1 image", vit, 1, [-1], 6, 8),
    ("small ViT, 1 image", vit, 1, "all", 6, 8),
    ("small ViT, 32 images", vit, 32, [-1], 8, 8),
    ("small ViT, 32 images", vit, 32, "all", 8, 8),
    ("Llama, 64 tokens", llama, 1, "all", 5, 2),
    ("ViT-S/16, 1 image", vit_s, 1, "all", 1, 1),
]


class Least(nn.Module):
    """Calls the module that it wraps and answers with its attributes: no switching, no other adapter."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        module = self._modules["module"]
        return module if name == "module" else getattr(module, name)


def least(model: PeftModel) -> PeftModel:
    """`model` with the least wrapper in the place of ours."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SurgicalLayer):
            model.set_submodule(name, Least(module.get_base_layer()))
    return model


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
    return f"{statistics.median(ratios):.4f} ({ratios[5]:.4f} to {ratios[-6]:.4f})"


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
) -> str:
    """Measure one case; its line of the table."""
    torch.manual_seed(0)
    random.seed(0)
    model, inputs = build(size)
    rounds = []
    for _ in range(ROUNDS):
        bare, control = sharing(model).eval(), sharing(model).eval()
        config = SurgicalConfig(blocks=blocks, keep_base="none")
        ours, floor = (get_peft_model(sharing(model), config).eval() for _ in range(2))
        models = [bare, control, ours, stock(model, ours).eval(), least(floor)]
        rounds.append(quartiles(models, inputs, turns, passes))
    times, twin, mine, theirs, fewest = (list(each) for each in zip(*rounds, strict=True))
    return (
        f"| {name} | {blocks if isinstance(blocks, str) else len(blocks)} | {1e3 * statistics.median(times):.2f} "
        f"| {compared(twin, times)} | {compared(mine, times)} | {compared(theirs, times)} "
        f"| {compared(fewest, times)} | {more(mine, times)} | {more(theirs, times)} | {more(fewest, times)} |"
    )


def main() -> None:
    """Print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| model | blocks wrapped | bare, ms | control / bare | ours / bare | stock / bare | least / bare "
        "| ours, µs more | stock | least |",
        "| --- | --- | ---: | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for case in CASES:
        lines.append(row(*case))
        print(lines[-1], flush=True)
    lines.append(f"\n{ROUNDS} rounds, one thread, torch {torch.__version__}. What each column is: `forward.py`.")
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
