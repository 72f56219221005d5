"""What training costs in time and memory: each method over full fine-tuning and over the arithmetic floor, in one run.

    make benchmark                                            # real weights, into benchmarks/speed
    python benchmarks/speed.py --device cuda --minutes 8      # the same table of a GPU, into benchmarks/speed-cuda

A case is a model, a batch, a dtype, with gradient checkpointing or without. In each a fully trained model stays alive,
and each method in turn is built, steps once to warm up, and then takes turns with the full one step by step, so that
what else the machine does meets both. The ratio is the median over these pairs, with the quartiles in brackets. On a
CPU time is CPU time of one thread, so that other processes count less; on a GPU it is that of the clock, synchronized.
Memory is what the method alone holds and makes in a step: live tensors on a CPU, the allocator's peak on a GPU.

The floor is time / full = (L + (L - e) + |S|) / 3 L for L blocks of which S get a gradient of their own weights, the
earliest one is e: a block's forward pass, passing a gradient through it and computing that of its weights cost the
same. It counts blocks alone. Embeddings and head run forward in every method, and a head passes the gradient on in
every method; their own weights are trained only where tuned. Trained embeddings make e = 0, and with LoRA |S| = 0.
Neither is the optimizer counted, whose work grows with what is tuned: where it weighs much, ratios fall below the
floor. Methods that change their blocks (LISA, BAdam) are timed between two switches, against the floor of what they
trained just then.

`ours` tunes whole blocks by this package, `stock` the same ones by PEFT's `modules_to_save`. The package `badam` takes
part where it is installed. Each finished line is kept in `work/lines.jsonl`, by which a killed run goes on; other
versions or another device are refused there. Models are those of `make real-data`, or random ones from a config.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import platform
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from speed_table import (
    Row,
    bars_table,
    case_table,
    groups_table,
    over_floor,
    page,
    plot,
    ratios,
    scoring_text,
    serving_table,
)
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    logging,
)

from surgical_peft import BlockMap, SurgicalConfig, create_surgical_optimizer, policies, score_blocks
from surgical_peft.experiments.training.profiling import LiveTensors

HERE = Path(__file__).parent
LR = 1e-6  # small: 16 steps leave the weights what they are
MOST, FEWEST = 15, 3  # pairs
SCORING, SERVING, GROUPS = "scoring", "serving", "groups"
BADAM, AUTO_RGN = "BAdam, package badam", "Auto-RGN, all blocks"
LAYERS = re.compile(r"\.layers?\.(\d+)\.")
ADAPTERS = 4


def clock_of(device: str) -> Callable[[], float]:
    """Seconds on a device: CPU time of this process, or the clock's time once a GPU has finished."""

    def synchronized() -> float:
        torch.accelerator.synchronize()
        return time.perf_counter()

    return time.process_time if device == "cpu" else synchronized


@dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        title: names it in the tables.
        load: gives the model.
        inputs: its batch; images as (number, channels, height, width), tokens as (number, length).
        dtype: of the weights.
        checkpointing: of gradients.
        methods: names in `METHODS`.
        seconds: that each method may take; there are three pairs at least.
        is_whole: whether files and forward passes are measured too.
    """

    title: str
    load: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    methods: Sequence[str]
    dtype: torch.dtype = torch.float32
    checkpointing: bool = False
    seconds: float = 8.0
    is_whole: bool = False

    @property
    def name(self) -> str:
        """With all that tells it from others."""
        size = f"{self.inputs[0]} x {self.inputs[-1]} {'px' if len(self.inputs) > 2 else 'tokens'}"
        ending = ", checkpointing" if self.checkpointing else ""
        return f"{self.title}, {size}, {str(self.dtype).removeprefix('torch.')}{ending}"

    def model(self, device: str) -> nn.Module:
        """A new one on the device, in train mode."""
        torch.manual_seed(0)
        with torch.device(device):
            model = self.load().to(self.dtype)
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        return model.train()

    def batch(self, model: nn.Module) -> dict[str, Tensor]:
        """Random inputs and labels."""
        device = next(model.parameters()).device
        if len(self.inputs) > 2:
            images = torch.randn(self.inputs, dtype=self.dtype, device=device)
            return {"pixel_values": images, "labels": torch.arange(self.inputs[0], device=device) % 2}
        tokens = torch.randint(3, model.config.vocab_size, self.inputs, device=device)
        return {"input_ids": tokens, "labels": tokens}


# Methods: a model becomes one that is trained, and its optimizer


def quarter(blocks: BlockMap, which: str) -> list[str]:
    """The first, middle or last quarter of the layers, rounded down, at least one."""
    layers = list(blocks.layers)
    size = max(1, len(layers) // 4)
    start = {"first": 0, "middle": (len(layers) - size) // 2, "last": len(layers) - size}[which]
    return layers[start : start + size]


def heads(model: nn.Module) -> list[str] | None:
    """A new head, which every method trains."""
    return ["classifier"] if isinstance(getattr(model, "classifier", None), nn.Linear) else None


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def full(model: nn.Module) -> tuple[nn.Module, Any]:
    """Everything, by plain AdamW."""
    return model, AdamW(model.parameters(), lr=LR, weight_decay=0.0)


def lora(model: nn.Module) -> tuple[nn.Module, Any]:
    """Rank 16 in all linear layers."""
    wrapped = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", modules_to_save=heads(model)))
    return wrapped, AdamW(trainable(wrapped), lr=LR, weight_decay=0.0)


def stock(model: nn.Module) -> tuple[nn.Module, Any]:
    """The last quarter by `modules_to_save`."""
    blocks = BlockMap.find(model)
    paths = [path for name in quarter(blocks, "last") for path in blocks.modules[name]] + (heads(model) or [])
    wrapped = get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=paths))
    return wrapped, AdamW(trainable(wrapped), lr=LR, weight_decay=0.0)


def ours(model: nn.Module, which: str, keep_base: str = "device", masters: bool = True) -> tuple[nn.Module, Any]:
    """A quarter by this package."""
    chosen = quarter(BlockMap.find(model), which)
    config = SurgicalConfig(blocks=chosen, keep_base=keep_base, modules_to_save=heads(model))
    wrapped = get_peft_model(model, config)
    return wrapped, create_surgical_optimizer(wrapped, AdamW, lr=LR, master_weights=masters)


def everything(model: nn.Module, policy: Any = None) -> tuple[nn.Module, Any]:
    """All weights where they stand, by our optimizer: with masters of 16-bit weights, under a policy or none."""
    return model, create_surgical_optimizer(model, AdamW, lr=LR, policy=policy)


def badam(model: nn.Module) -> tuple[nn.Module, Any]:
    """The package `badam`; it prints each switch."""
    from badam import BlockOptimizer

    blocks = BlockMap.find(model)
    prefixes = [[f"{path}." for path in blocks.modules[name]] for name in blocks.layers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        adam = AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        optimizer = BlockOptimizer(adam, list(model.named_parameters()), prefixes, 2, switch_mode="random")
    optimizer.global_step = 1  # it counts one ahead: the first switch would be after one step
    return model, optimizer


METHODS: dict[str, Callable[[nn.Module], tuple[nn.Module, Any]]] = {
    "full": full,
    "full, float32 masters": everything,
    "LoRA r=16, all linear": lora,
    "stock PEFT, last quarter": stock,
    "LISA, 2 blocks": partial(everything, policy=policies.lisa(every=2)),
    "BAdam": partial(everything, policy=policies.badam(every=2, always=[])),
    BADAM: badam,
    AUTO_RGN: partial(everything, policy=policies.auto_rgn()),
    "ours, first quarter": partial(ours, which="first"),
    "ours, middle quarter": partial(ours, which="middle"),
    "ours, last quarter": partial(ours, which="last"),
    "ours, last quarter, base on the CPU": partial(ours, which="last", keep_base="cpu"),
    "ours, last quarter, no base": partial(ours, which="last", keep_base="none"),
    "ours, last quarter, no masters": partial(ours, which="last", masters=False),
}
SWITCHING = ("LISA, 2 blocks", "BAdam", BADAM)
SAVED = ("full", "LoRA r=16, all linear", "stock PEFT, last quarter", "ours, first quarter", "ours, last quarter")


class Training:
    """A method on a case."""

    def __init__(self, case: Case, method: str, device: str) -> None:
        self.model, self.optimizer = METHODS[method](case.model(device))
        self.batch = case.batch(self.model)
        self.clock = clock_of(device)
        self.turn = 2 if method in SWITCHING else 1
        self.state_bytes = 0
        self.adapts = "LoRA" in method
        self.num_layers = len(BlockMap.find(case_base(self.model)).layers)

    def step(self) -> tuple[float, float]:
        """The seconds of a step, and its floor; `state_bytes` is the most that the optimizer has kept."""
        began = self.clock()
        self.model(**self.batch).loss.backward()
        paused = self.clock()
        floor = self.floor()
        resumed = self.clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = paused - began + self.clock() - resumed
        sizes = {state.untyped_storage()._cdata: state.untyped_storage().nbytes() for state in self.state()}
        self.state_bytes = max(self.state_bytes, sum(sizes.values()))
        for _ in range(self.turn - 1):
            self.model(**self.batch).loss.backward()
            with contextlib.redirect_stdout(io.StringIO()):  # of badam
                self.optimizer.step()
            self.optimizer.zero_grad()
        return seconds, floor

    def floor(self) -> float:
        """Of the step whose gradients are there now."""
        names = [name for name, weight in self.model.named_parameters() if weight.grad is not None]
        layers = {int(number[1]) for name in names if (number := LAYERS.search(name))}
        first = 0 if any("embed" in name for name in names) else min(layers)
        tuned = 0 if self.adapts else len(layers)
        return (2 * self.num_layers - first + tuned) / (3 * self.num_layers)

    def forward(self) -> float:
        """Seconds of a forward pass for inference."""
        began = self.clock()
        with torch.no_grad():
            self.model(**self.batch)
        return self.clock() - began

    def state(self) -> list[Tensor]:
        """The tensors of the optimizer."""
        inner = getattr(self.optimizer, "base_optimizer", self.optimizer)
        tensors = [leaf for state in inner.state.values() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        return tensors + list(getattr(self.optimizer, "param_idx2hp", {}).values())


def case_base(model: nn.Module) -> nn.Module:
    """The model inside PEFT's."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class Peak:
    """The most bytes at any time inside: of the given tensors and those made since, or what a GPU gave out."""

    def __init__(self, device: str, tensors: Iterable[Tensor], before: int = 0) -> None:
        self.on_cpu, self.before, self.bytes = device == "cpu", before, 0
        self._live = LiveTensors()
        for tensor in tensors if self.on_cpu else ():
            self._live.count(tensor)

    def __enter__(self) -> Peak:
        if self.on_cpu:
            self._live.__enter__()
        else:
            torch.accelerator.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.on_cpu:
            self._live.__exit__(*error)
            self.bytes = self._live.peak
        else:
            self.bytes = torch.accelerator.max_memory_allocated() - self.before


def allocated(device: str) -> int:
    """Bytes that a GPU holds now."""
    gc.collect()
    return 0 if device == "cpu" else torch.accelerator.memory_allocated()


def pairs(
    first: Callable[[], Any], second: Callable[[], Any], seconds: float, clock: Callable[[], float]
) -> list[Any]:
    """What both give, in turns, each one first every second time; for so many seconds, three pairs at least."""
    results: list[Any] = []
    began = clock()
    while len(results) < FEWEST or (len(results) < MOST and clock() - began < seconds):
        if len(results) % 2:
            other = second()
            results.append((first(), other))
        else:
            results.append((first(), second()))
    return results


# What is measured


def training_row(case: Case, method: str, reference: Training, device: str) -> Row:
    """One method over full fine-tuning."""
    before = allocated(device)
    run = Training(case, method, device)
    run.step()
    with Peak(device, [*run.model.parameters(), *run.model.buffers(), *run.state()], before) as peak:
        run.step()
    timed = pairs(reference.step, run.step, case.seconds, run.clock)
    row = {
        "full_ms": [1000 * base[0] for base, _ in timed],
        "ms": [1000 * mine[0] for _, mine in timed],
        "floors": [mine[1] for _, mine in timed],
        "peak_bytes": peak.bytes,
        "state_bytes": run.state_bytes,
    }
    if case.is_whole:
        reference.model.eval()
        run.model.eval()
        timed = pairs(reference.forward, run.forward, case.seconds / 4, run.clock)
        row["forward"] = [mine / base for base, mine in timed]
        reference.model.train()
        if method in SAVED:
            row |= files(case, run, device)
    return row


def files(case: Case, run: Training, device: str) -> Row:
    """Bytes of what is saved, seconds of loading it and of switching between two."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        run.model.save_pretrained(folder)
        row: Row = {"file_bytes": sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))}
        loads, switches = [], []
        for _ in range(3):
            if not isinstance(run.model, PeftModel):
                began = run.clock()
                type(run.model).from_pretrained(folder).to(device)
                loads.append(run.clock() - began)
                continue
            base = case.model(device)
            began = run.clock()
            loaded = PeftModel.from_pretrained(base, folder)
            loads.append(run.clock() - began)
            loaded.load_adapter(folder, "second")
            for name in ("second", "default"):
                began = run.clock()
                loaded.set_adapter(name)
                switches.append(run.clock() - began)
    row["load_ms"] = 1000 * statistics.median(loads)
    return row | ({"switch_ms": 1000 * statistics.median(switches)} if switches else {})


def scoring_row(case: Case, device: str) -> Row:
    """`score_blocks` by `rgn` over a plain forward and backward pass on the same batch.

    Its memory is measured on 16 tokens, where gradients and not activations make the peak.
    """
    model, clock = case.model(device).eval(), clock_of(device)
    batch = replace(case, inputs=(1, 16)).batch(model)

    def plain() -> float:
        began = clock()
        model(**batch).loss.backward()
        model.zero_grad()
        return clock() - began

    def scored() -> float:
        began = clock()
        score_blocks(model, [batch], criterion="rgn")
        return clock() - began

    before = allocated(device)
    weights = [*model.parameters(), *model.buffers()]
    before -= sum(weight.nbytes for weight in weights)
    with Peak(device, weights, before) as scoring:
        scored()
    with Peak(device, weights, before) as kept:
        plain()
    hooks = [weight.register_post_accumulate_grad_hook(drop_gradient) for weight in trainable(model)]
    with Peak(device, weights, before) as dropped:
        plain()
    for hook in hooks:
        hook.remove()
    block = max(sum(weight.nbytes for weight in own) for own in BlockMap.find(model).parameters(model).values())
    batch = case.batch(model)
    timed = pairs(plain, scored, case.seconds, clock)
    return {
        "plain_ms": [1000 * base for base, _ in timed],
        "ms": [1000 * mine for _, mine in timed],
        "extra_bytes": scoring.bytes - dropped.bytes,
        "peak_bytes": scoring.bytes,
        "kept_bytes": kept.bytes,
        "block_bytes": block,
    }


def drop_gradient(weight: Tensor) -> None:
    """A hook."""
    weight.grad = None


@torch.no_grad()
def serving_row(case: Case, device: str) -> Row:
    """Four adapters of the last quarter: in one batch, one at a time, and as merged models, over the bare model."""
    clock, bare = clock_of(device), case.model(device).eval()
    inputs = {key: value for key, value in case.batch(bare).items() if key != "labels"}
    inputs |= {"use_cache": False} if "input_ids" in inputs else {}
    rows = case.inputs[0] // ADAPTERS
    split = [
        {
            key: value[at * rows : (at + 1) * rows] if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
        for at in range(ADAPTERS)
    ]
    names = [f"adapter {at}" for at in range(ADAPTERS)]
    config = SurgicalConfig(blocks=quarter(BlockMap.find(bare), "last"), inference_mode=True)
    served = get_peft_model(copy.deepcopy(bare), config, adapter_name=names[0])
    for name in names[1:]:
        served.add_adapter(name, config)
    served.eval()
    merged = [copy.deepcopy(bare) for _ in names]  # what merging gives: the bare architecture with weights of its own
    of_rows = [name for name in names for _ in range(rows)]

    def one_by_one() -> None:
        for name, part in zip(names, split, strict=True):
            served.set_adapter(name, inference_mode=True)
            served(**part)

    def apart() -> None:
        for model, part in zip(merged, split, strict=True):
            model(**part)

    ways: dict[str, Callable[[], Any]] = {
        "one mixed batch": lambda: served(**inputs, adapter_names=of_rows),
        "one adapter at a time": one_by_one,
        "four merged models": apart,
        "one adapter, whole batch": lambda: served(**inputs),
    }

    def seconds(run: Callable[[], Any]) -> float:
        began = clock()
        run()
        return clock() - began

    row: Row = {}
    for way, run in ways.items():
        run()
        timed = pairs(lambda: seconds(lambda: bare(**inputs)), lambda run=run: seconds(run), case.seconds, clock)
        row[way] = {"bare_ms": [1000 * base for base, _ in timed], "ms": [1000 * mine for _, mine in timed]}
    return row


def groups_row(device: str) -> Row:
    """What 60 groups, one for each block with weight decay or without, cost a step of AdamW over two groups.

    30 blocks of 16 tensors so small that the calls are what takes time, as on a GPU the launches do.
    """
    model, clock, row = vit(30, 64, 32).to(device), clock_of(device), {}
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    for kind in ("fused", "foreach"):
        mine = create_surgical_optimizer(model, AdamW, lr=LR, weight_decay=0.01, **{kind: True})
        decayed: dict[float, list[nn.Parameter]] = {}
        for group in mine.param_groups:
            decayed.setdefault(group["weight_decay"], []).extend(group["params"])
        groups = [{"params": weights, "weight_decay": decay} for decay, weights in decayed.items()]
        plain = AdamW(groups, lr=LR, **{kind: True})

        def seconds(optimizer: Any) -> float:
            began = clock()
            optimizer.step()
            return clock() - began

        calls = {}
        for name, optimizer in (("plain_calls", plain), ("calls", mine)):
            optimizer.step()
            with torch.profiler.profile() as profile:
                optimizer.step()
            events = profile.key_averages()
            calls[name] = sum(
                event.count for event in events if event.key.startswith(("aten::_foreach", "aten::_fused"))
            )
        timed = pairs(partial(seconds, plain), partial(seconds, mine), 2, clock)
        row[kind] = {**calls, "plain_ms": [1000 * a for a, _ in timed], "ms": [1000 * b for _, b in timed]}
    return row


# What there is to measure


def vit(layers: int, width: int, size: int, patch: int = 16) -> nn.Module:
    """A vision transformer with random weights."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    return ViTForImageClassification(
        ViTConfig(**sizes, intermediate_size=4 * width, image_size=size, patch_size=patch, num_labels=10)
    )


def llama_1b() -> nn.Module:
    """The sizes of Llama 3.2 1B, with random weights."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True, use_cache=False)
    return LlamaForCausalLM(config)


def cases(models: Path, on_cpu: bool) -> list[Case]:
    """All trainings, by worth: a run that must end early has the first ones."""
    photos = partial(AutoModelForImageClassification.from_pretrained, models / "vit-s14", num_labels=10)
    words = partial(AutoModelForCausalLM.from_pretrained, models / "smollm2", dtype=torch.float32, use_cache=False)
    vit_s = Case("ViT-S/14", photos, (8, 3, 56, 56) if on_cpu else (64, 3, 224, 224), (), is_whole=True, seconds=6)
    smol = Case("SmolLM2-135M", words, (2, 128) if on_cpu else (8, 512), (), is_whole=True)
    sides = ("ours, last quarter", "ours, first quarter")
    rivals = ("LoRA r=16, all linear", "stock PEFT, last quarter")
    whole = [name for name in METHODS if "masters" not in name]
    half = ("full, float32 masters", *rivals, *sides, "ours, last quarter, no masters")
    found = [replace(case, methods=whole) for case in (smol, vit_s)]
    saving = {"checkpointing": True, "is_whole": False}
    found += [replace(case, methods=("ours, last quarter", *rivals), **saving) for case in (smol, vit_s)]
    found += [replace(case, methods=half, dtype=torch.bfloat16, is_whole=False) for case in (smol, vit_s)]
    found += [
        replace(vit_s, inputs=(size, *vit_s.inputs[1:]), methods=("ours, last quarter", rivals[0]), is_whole=False)
        for size in ((2, 32) if on_cpu else (16, 256))  # the third is the first case
    ]
    if on_cpu:  # the weights are read once a step, whatever the batch: a batch as in training
        found.append(replace(vit_s, inputs=(8, 3, 112, 112), methods=(AUTO_RGN,), is_whole=False, seconds=16))
    width, size, number = (192, 64, 8) if on_cpu else (768, 224, 64)
    found += [
        Case(f"ViT of {depth} blocks, width {width}", partial(vit, depth, width, size), (number, 3, size, size), sides)
        for depth in (6, 12, 24)
    ]
    size, number = (96, 2) if on_cpu else (224, 64)
    found.append(Case("ViT-B/16", partial(vit, 12, 768, size), (number, 3, size, size), sides))
    if not on_cpu:  # it takes 20 GB and a minute a step on one core
        found.append(Case("Llama 1B", llama_1b, (2, 512), half, dtype=torch.bfloat16))
        found = [replace(case, seconds=3) for case in found]
    return found


@dataclass(frozen=True)
class Bar:
    """A measure that is to stay below a bar; `values` reads it off its line, once for each pair."""

    measure: str
    key: str
    bar: float
    values: Callable[[Row], list[float]] = ratios


def bars(known: Sequence[Case]) -> list[Bar]:
    """What is aimed at."""
    smol, vit_s, smol_saving, vit_saving = (case.name for case in known[:4])
    found = [
        Bar(
            f"{side} quarter: step / full, over the floor, {model}", f"{name} | ours, {side} quarter", 1.05, over_floor
        )
        for side in ("last", "first")
        for name, model in ((vit_s, "12 blocks (ViT-S/14)"), (smol, "30 blocks (SmolLM2)"))
    ]
    found += [
        Bar(f"last quarter / full, both checkpointed, {model}", f"{name} | ours, last quarter", 0.45)
        for name, model in ((vit_saving, "ViT-S/14"), (smol_saving, "SmolLM2"))
    ]
    found += [
        Bar(f"Auto-RGN / AdamW, a step, {case.name}", f"{case.name} | {AUTO_RGN}", 1.02)
        for case in known[1:]
        if AUTO_RGN in case.methods
    ]
    found.append(Bar("scoring / forward + backward, SmolLM2", SCORING, 1.05, partial(ratios, base="plain_ms")))
    extra = "scoring: memory beyond the passes / gradients of the largest block, SmolLM2"
    found.append(Bar(extra, SCORING, 1.0, lambda row: 2 * [row["extra_bytes"] / row["block_bytes"]]))
    return found + [
        Bar(f"4 adapters in one mixed batch / bare model, {case.title}", f"{case.title} | {SERVING}", 1.25, mixed)
        for case in known[1::-1]
    ]


def mixed(row: Row) -> list[float]:
    """Of a mixed batch."""
    return ratios(row["one mixed batch"], "bare_ms")


def run(path: Path, known: Sequence[Case], device: str, minutes: float) -> None:
    """Measure what is missing in the file of lines."""
    ends = time.monotonic() + 60 * minutes
    rows = lines_of(path, device)

    def measured(key: str, measure: Callable[[], Row]) -> None:
        if key in rows or time.monotonic() > ends:
            return
        rows[key] = measure()
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **rows[key]}) + "\n")
        print(key, flush=True)

    smol, vit_s = known[:2]
    measured(SCORING, partial(scoring_row, replace(smol, inputs=(4, 128) if device == "cpu" else smol.inputs), device))
    for case in (smol, vit_s):
        served = replace(case, inputs=(2 * ADAPTERS, *case.inputs[1:]), seconds=4)
        measured(f"{case.title} | {SERVING}", partial(serving_row, served, device))
    measured(GROUPS, partial(groups_row, device))
    first = {bar.key for bar in bars(known)}
    for is_first in (True, False):  # the bars first, and images, whose steps are shorter
        for case in sorted(known, key=lambda case: len(case.inputs), reverse=True):
            methods = [name for name in case.methods if name != BADAM or can_import("badam")]
            keys = {key: name for name in methods if (key := f"{case.name} | {name}") not in rows}
            keys = {key: name for key, name in keys.items() if key in first or not is_first}
            if not keys or time.monotonic() > ends:
                continue
            references = [Training(case, "full", device)]  # freed before the next one
            references[0].step()
            for key, name in keys.items():
                measured(key, partial(training_row, case, name, references[0], device))
                gc.collect()
            references.clear()


def write(path: Path, known: Sequence[Case], folder: Path, device: str) -> None:
    """Table, picture and report from the file of lines."""
    rows = lines_of(path, device)
    now = environment(device)
    versions = ", ".join(f"{name} {number}" for name, number in now["versions"].items())
    threads = "one thread, CPU time" if device == "cpu" else "time by the clock, synchronized"
    header = (
        f"{now['device']}, {threads}; {versions}. Medians of pairs, quartiles in brackets; what each column is: "
        "`benchmarks/speed.py`. Ratios are to full fine-tuning under the same settings."
    )
    by_case = {
        case.name: {name: rows[key] for name in case.methods if (key := f"{case.name} | {name}") in rows}
        for case in known
    }
    by_case = {name: found for name, found in by_case.items() if found}
    sections = {name: case_table(found) for name, found in by_case.items()}
    served = {case.title: rows[key] for case in known[:2] if (key := f"{case.title} | {SERVING}") in rows}
    planned = 1 + 2 + 1 + sum(len(case.methods) for case in known)
    if (count := sum(map(len, by_case.values())) + len(rows.keys() & {SCORING, GROUPS}) + len(served)) < planned:
        header += f" {count} of {planned} lines: the others have not been measured yet, the same command goes on."
    if SCORING in rows:
        sections["Scoring, SmolLM2-135M"] = scoring_text(rows[SCORING])
    if served:
        sections["Four adapters, two rows each"] = serving_table(served)
    if GROUPS in rows:
        sections["A group for each block: a step of AdamW on 30 blocks of 16 small tensors"] = groups_table(
            rows[GROUPS]
        )
    (folder / "table.md").write_text(page(header, bars_table(bars(known), rows), sections), encoding="utf-8")
    report = json.dumps({**now, "threads": torch.get_num_threads(), "rows": rows}, indent=1)
    (folder / "report.json").write_text(report + "\n", encoding="utf-8")
    if pictured := {case.name: by_case[case.name] for case in known[:2] if case.name in by_case}:
        plot(pictured, now["device"], folder / "steps.png")


def main() -> None:
    """Measure what is missing, and write the table, also of what there is when it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE.parent / "data" / "real", help="holds vit-s14 and smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--output", type=Path, help="folder; benchmarks/speed, with -DEVICE unless on a CPU")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing")  # PEFT reads a deprecated name
    folder = given.output or HERE / ("speed" if given.device == "cpu" else f"speed-{given.device}")
    path = folder / "work" / "lines.jsonl"
    known = cases(given.models, given.device == "cpu")
    try:
        run(path, known, given.device, given.minutes)
    finally:
        write(path, known, folder, given.device)


def can_import(package: str) -> bool:
    """True if it is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def environment(device: str) -> Row:
    """Device and versions."""
    packages = ("torch", "transformers", "peft", "surgical-peft")
    chip = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    if device == "cpu" and (info := Path("/proc/cpuinfo")).exists():
        chip = next((line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line), chip)
    return {"device": chip, "versions": {name: version(name) for name in packages}}


def lines_of(path: Path, device: str) -> dict[str, Row]:
    """Finished lines by key; the file is begun where there is none. A line that was cut off is measured again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = environment(device)
    if not path.exists():
        path.write_text(json.dumps(now) + "\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    head, *rest = text.splitlines()
    if json.loads(head) != now:
        raise SystemExit(f"{path} is of {head}, and this is {json.dumps(now)}: delete it to start anew.")
    if not text.endswith("\n"):
        rest = rest[:-1]
        path.write_text("\n".join([head, *rest]) + "\n", encoding="utf-8")
    return {row.pop("key"): row for row in map(json.loads, rest)}


if __name__ == "__main__":
    main()
