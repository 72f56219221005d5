"""What gradient checkpointing costs and saves: the last 2 of 12 blocks tuned, over full fine-tuning, in one run.

    python benchmarks/checkpointing.py

A Llama of 12 blocks, sequences of 128 tokens, AdamW, one thread. The methods take turns step by step, so that
whatever else the machine does meets all of them; times are medians of `--steps` turns. `stock PEFT` tunes the same two
blocks by `modules_to_save`, checkpointed as PEFT and transformers ship it. Two memories, neither with weights or
gradients: what autograd keeps at the end of the forward pass, and the allocator's peak during forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from surgical_peft import SurgicalConfig

BLOCKS, TUNED, SEQUENCE, BATCH, VOCABULARY = 12, (10, 11), 128, 8, 256
METHODS = ("full", "stock PEFT", "surgical")


class Training:
    """One method, with or without checkpointing, and its optimizer."""

    def __init__(self, method: str, checkpointing: bool) -> None:
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=256,
                intermediate_size=688,
                num_hidden_layers=BLOCKS,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                use_cache=False,
            )
        )
        if method == "stock PEFT":
            names = [f"layers.{block}" for block in TUNED]
            model = get_peft_model(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=names))
        elif method == "surgical":
            model = get_peft_model(model, SurgicalConfig(blocks=list(TUNED)))
        if checkpointing:
            model.activation_checkpointing_enable()
        self.model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
        self.batch = {"input_ids": tokens, "labels": tokens}

    def step(self) -> float:
        """Train one step; returns its seconds."""
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay allocated: they are no activations
        return time.perf_counter() - start

    def kept(self) -> int:
        """Bytes that autograd keeps at the end of the forward pass, without the model's own."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(**self.batch).loss
        total = sum(storages.values())
        loss.backward()
        self.optimizer.zero_grad(set_to_none=False)
        return total

    def peak(self) -> int:
        """The most that a forward and backward pass has allocated at any time, on top of what there was before."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.model(**self.batch).loss.backward()
        self.optimizer.zero_grad(set_to_none=False)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            most = max(most, live)
        return most


def main() -> None:
    """Print the table and write it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing")  # PEFT reads a deprecated name
    runs = {(method, on): Training(method, on) for method in METHODS for on in (False, True)}
    for run in runs.values():
        run.step()  # warm up; gradients and optimizer state are there from now on
    kept = {key: run.kept() for key, run in runs.items()}
    peaks = {key: run.peak() for key, run in runs.items()}
    turns = [{key: run.step() for key, run in runs.items()} for _ in range(steps)]

    def seconds(key: tuple[str, bool]) -> float:
        return statistics.median(turn[key] for turn in turns)

    def over(measure: Callable[[tuple[str, bool]], float], key: tuple[str, bool]) -> str:
        return f"{measure(key) / measure(('full', True)):.2f}"

    lines = [
        "| method | checkpointing | step, ms | of full + cp | kept, MiB | of full + cp | peak, MiB | of full + cp |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key in runs:
        cells = [key[0], "yes" if key[1] else "no", f"{1e3 * seconds(key):.0f}", over(seconds, key)]
        for measured in (kept, peaks):
            cells += [f"{measured[key] / 2**20:.1f}", over(measured.__getitem__, key)]
        lines.append(f"| {' | '.join(cells)} |")
    ours, plain, full = seconds(("surgical", True)), seconds(("surgical", False)), seconds(("full", False))
    cp, full_cp, logits = kept["surgical", True], kept["full", True], 4 * BATCH * SEQUENCE * VOCABULARY
    lines += [
        "",
        f"A checkpointed surgical step takes {ours / plain:.2f} x one without checkpointing (aim: 1.20 at most) and "
        f"{ours / full:.2f} x one of full fine-tuning without (aim: below 1).",
        f"Of what is kept, {logits / 2**20:.1f} MiB in each row are the loss's, of the size of the logits: without "
        f"them, checkpointed surgical over full is {(cp - logits) / (full_cp - logits):.2f}. The peak holds one whole "
        "block while that is recomputed, whichever method; it cannot fall much further.",
        f"Medians of {steps} turns, one thread, torch {torch.__version__}; {BLOCKS} blocks of width 256, "
        f"{BATCH} sequences of {SEQUENCE} tokens, blocks {TUNED} tuned. `cp`: checkpointing.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "checkpointing.md").write_text(text)


if __name__ == "__main__":
    main()
