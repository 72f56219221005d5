"""Is a bfloat16 model with 32-bit masters tuned as a float32 one is? And what do the masters cost?

    python benchmarks/master_weights.py                # the Llama toy: 3 minutes on one core
    python benchmarks/master_weights.py models GSM8K   # SmolLM2-135M as well: 2 hours

`models` holds `smollm2` (python benchmarks/real_models.py models makes it), GSM8K is a folder with `train.jsonl`
(`openai/gsm8k` on the Hub). Writes `master_weights.json`, an entry for each training, by which it goes on where it
stopped, and from that `master_weights.md`.

100 steps of fused AdamW (Trainer's default) at a constant rate, of 2 x 64 tokens (toy: 8 x 32), on what is named. All
trainings of a row start from the same weights, rounded to bfloat16, and see the same batches. The loss is that of 16
held-out sequences, by a float32 model with the weights that came out; of float32 tuning also with its weights rounded
to bfloat16 in the end, the most that a bfloat16 model can be. Noise: by how much float32 tuning differs when its
batches come in two other orders, the largest of three differences.

Step times: with and without masters in turns in one process, batches of 4 x 128 tokens (toy: 8 x 32), medians of 9
steps (toy: 99), the time of the process, so that other work on the machine does not count. By hand: torch's own AdamW
on float32 copies, gradients cast and weights rounded in a loop, nothing else: the least that masters can cost. Bytes:
of what is tuned, for each weight.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from surgical_peft import SurgicalConfig, create_surgical_optimizer

HERE = Path(__file__).parent
NUMBERS = HERE / "master_weights.json"
STEPS, RATES, ORDERS = 100, (1e-3, 1e-4, 2e-5), (1, 2)
PARTS: dict[str, dict[str, Any]] = {
    "norms": {"blocks": "all", "target_modules": "all-norm"},
    "last two blocks": {"blocks": [-2, -1]},
    "head": {"blocks": ["head"]},
    "whole model": {"blocks": "all"},
}
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "masters": {"dtype": torch.bfloat16},
    "none": {"dtype": torch.bfloat16, "master_weights": False},
}


class Source:
    """A model to start from, and token sequences: to train on, and held out."""

    def __init__(self, name: str, load: Callable[[], nn.Module], tokens: Tensor, batch: int) -> None:
        self.name, self.load = name, load
        self.held_out, self.tokens, self.batch = tokens[:16], tokens[16:], batch

    def tuned(self, part: str, dtype: torch.dtype, master_weights: bool = True, lr: float = 1e-4) -> tuple[Any, Any]:
        """The wrapped model, from weights that bfloat16 holds exactly, and its optimizer."""
        model = get_peft_model(self.load().bfloat16().to(dtype), SurgicalConfig(**PARTS[part])).train()
        optimizer = create_surgical_optimizer(
            model, torch.optim.AdamW, lr=lr, weight_decay=0.0, fused=True, master_weights=master_weights
        )
        return model, optimizer

    def losses_after(self, part: str, lr: float, order: int = 0, **way: Any) -> list[float]:
        """Train, and measure on the held-out sequences, as it is and rounded."""
        model, optimizer = self.tuned(part, lr=lr, **way)
        places = torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(order))
        for step in range(STEPS):
            at = torch.arange(step * self.batch, (step + 1) * self.batch) % len(places)
            advance(model, optimizer, self.tokens[places[at]])
        return [held_out_loss(model, self.held_out), held_out_loss(model.bfloat16(), self.held_out)]


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """One training step."""
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def held_out_loss(model: nn.Module, ids: Tensor) -> float:
    """In float32."""
    model.float().eval()
    with torch.no_grad():
        return statistics.fmean(model(input_ids=row[None], labels=row[None]).loss.item() for row in ids)


def toy() -> Source:
    """A Llama of 4 layers that has learned one text, and texts that shift each token by one."""
    generator = torch.Generator().manual_seed(0)
    follows = torch.randint(0, 64, (64, 4), generator=generator)

    def texts(count: int, shift: int) -> Tensor:
        rows = [torch.randint(0, 64, (count,), generator=generator)]
        for _ in range(31):
            rows.append(follows[rows[-1], torch.randint(0, 4, (count,), generator=generator)])
        return (torch.stack(rows, 1) + shift) % 64

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        advance(model, optimizer, texts(16, 0))
    weights = model.state_dict()

    def load() -> nn.Module:
        fresh = LlamaForCausalLM(model.config)
        fresh.load_state_dict(weights)
        return fresh

    return Source("Llama toy", load, texts(816, 1), 8)


def smollm2(models: Path, gsm8k: Path) -> Source:
    """Problems and answers as one stream of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(models / "smollm2")
    lines = (gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines()[:400]
    texts = (f"Question: {each['question']}\nAnswer: {each['answer']}\n\n" for each in map(json.loads, lines))
    stream = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    rows = stream[: 216 * 64].view(216, 64)
    load = partial(AutoModelForCausalLM.from_pretrained, models / "smollm2", dtype=torch.float32)
    return Source("SmolLM2-135M", load, rows, 2)


class ByHand(torch.optim.AdamW):
    """Float32 copies of the weights, and no more."""

    def __init__(self, weights: list[Tensor], **settings: Any) -> None:
        self.weights = weights
        super().__init__([weight.detach().float() for weight in weights], **settings)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Cast, step, round."""
        copies = self.param_groups[0]["params"]
        for weight, copy in zip(self.weights, copies, strict=True):
            copy.grad = weight.grad.float()  # type: ignore[union-attr]
            weight.grad = None
        super().step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, copies)
        self.zero_grad()


def costs(source: Source, part: str) -> dict[str, float]:
    """Seconds of a step with and without masters and by hand, and bytes for each tuned weight."""
    runs = {way: source.tuned(part, **WAYS[way]) for way in ("masters", "none")}
    model, _ = source.tuned(part, torch.bfloat16, False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    runs["by hand"] = model, ByHand(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids, turns = (source.tokens[:8].reshape(4, -1), 10) if source.batch == 2 else (source.tokens[:8], 100)
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(turns):
        for way, (model, optimizer) in runs.items():
            start = time.process_time()
            advance(model, optimizer, ids)
            if turn:  # the first makes the state
                seconds[way].append(time.process_time() - start)
    found: dict[str, float] = {way: statistics.median(times) for way, times in seconds.items()}
    for name, way in (("ratio", "masters"), ("ratio by hand", "by hand")):
        found[name] = statistics.median(a / b for a, b in zip(seconds[way], seconds["none"], strict=True))
    for way in ("masters", "none"):
        model, optimizer = runs[way]
        tuned = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
        found[f"{way} bytes"] = sum(value.numel() * value.element_size() for value in state) / tuned
    found["tuned"] = tuned
    return found


def measured(source: Source, numbers: dict[str, Any]) -> None:
    """Add what is missing of this source, one entry after the other."""

    def once(key: str, measure: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if key not in numbers:
            numbers[key] = measure(*args, **kwargs)
            NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n")

    once(f"{source.name}, before", held_out_loss, source.load().bfloat16(), source.held_out)
    for part in PARTS:
        if part == "head" and source.load().config.tie_word_embeddings:
            continue  # the head is the embeddings there, which the whole model has
        once(f"{source.name}, {part}, costs", costs, source, part)
        for lr in RATES:
            row = f"{source.name}, {part}, {lr}"
            for way, settings in WAYS.items():
                once(f"{row}, {way}", source.losses_after, part, lr, **settings)
            for order in ORDERS:
                once(f"{row}, order {order}", source.losses_after, part, lr, order, dtype=torch.float32)


def table(numbers: dict[str, Any]) -> str:
    """The tables, from all entries."""
    sources = list(dict.fromkeys(key.partition(", ")[0] for key in numbers))
    lines = [
        "# 32-bit masters for 16-bit weights",
        "",
        f"`python benchmarks/master_weights.py models GSM8K`; what is measured, and how, is told in its header. Loss "
        f"after {STEPS} steps, held out.",
        "",
        "| model | tuned | rate | float32 | rounded | bfloat16, masters | bfloat16, none | noise of float32 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for source in sources:
        for part in PARTS:
            for lr in RATES:
                row = f"{source}, {part}, {lr}"
                if f"{row}, order {ORDERS[-1]}" not in numbers:
                    continue
                both, *others = (numbers[f"{row}, {way}"] for way in WAYS)
                orders = [both[0], *(numbers[f"{row}, order {order}"][0] for order in ORDERS)]
                losses = (*both, *(loss for loss, _ in others), max(orders) - min(orders))
                lines.append(f"| {source} | {part} | {lr:g} | {' | '.join(f'{loss:.4f}' for loss in losses)} |")
    lines += [
        "",
        "Before: " + ", ".join(f"{source} {numbers[f'{source}, before']:.4f}" for source in sources) + ".",
        "",
        "| model | tuned | weights | state, bytes a weight | without masters | step, ms | without | ratio | by hand |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for source in sources:
        for part in PARTS:
            if found := numbers.get(f"{source}, {part}, costs"):
                cells = [f"{found['tuned']:,}", *(f"{found[f'{way} bytes']:.1f}" for way in ("masters", "none"))]
                cells += [*(f"{1e3 * found[way]:.0f}" for way in ("masters", "none")), f"{found['ratio']:.3f}"]
                cells.append(f"{found['ratio by hand']:.3f}")
                lines.append(f"| {source} | {part} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"torch {torch.__version__}, one thread."]) + "\n"


def main() -> None:
    """Measure what is missing, and write the tables."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    measured(toy(), numbers)
    if len(sys.argv) > 2:
        measured(smollm2(Path(sys.argv[1]), Path(sys.argv[2])), numbers)
    text = table(numbers)
    (HERE / "master_weights.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
