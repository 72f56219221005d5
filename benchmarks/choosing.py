"""What `blocks="auto"` costs within its budget, half of the planned training, and how good its choice is then.

    python benchmarks/real_models.py models           # makes the two models, see there
    python benchmarks/choosing.py models CIFAR GSM8K   # two hours on one core

`models` holds `vit-s14` and `smollm2`; CIFAR is a folder with CIFAR-10 as `train.parquet` (columns `image` and
`label`; `uoft-cs/cifar10` on the Hub), GSM8K one with `train.jsonl` (`question` and `answer`; `openai/gsm8k`). Writes
`choosing.json`, an entry for each thing measured, by which it goes on where it stopped, and from that `choosing.md`.

Time is that of the process, on one thread, so that other work on the machine does not count. A training is so many
full steps as were planned: forward, backward and AdamW on all weights; a step is the mean of two medians, of five
before choosing and five after. Regret: the choice and each of some candidates are trained for the planned steps at
two rates (AdamW, falling linearly to 0), and judged at the better one on batches that nothing else has seen.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
from transformers.utils import logging

from surgical_peft import BlockMap, SurgicalConfig, create_surgical_optimizer, get_surgical_model
from surgical_peft.auto import choose_blocks
from surgical_peft.criteria.budget import Budget, half_of
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.tasks import load_task

HERE = Path(__file__).parent
NUMBERS = HERE / "choosing.json"
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model, what it is to learn, and for how long.

    Attributes:
        title: of the rows.
        steps: of the planned training.
        load: gives the model, batches to train on and batches to judge by.
        candidates: what the choice is measured against; none: too dear.
        rates: that all of them are trained at.
        head: a new head, trained whatever is chosen.
        repeats: how often choosing is timed.
        is_free_too: whether what is chosen without a budget is looked at; elsewhere that costs many trainings.
    """

    title: str
    steps: int
    load: Callable[[], tuple[nn.Module, list[Batch], list[Batch]]]
    candidates: Sequence[Sequence[str]]
    rates: tuple[float, ...]
    head: str | None = None
    repeats: int = 1
    is_free_too: bool = False

    @property
    def config(self) -> SurgicalConfig:
        """Leaves the blocks open."""
        return SurgicalConfig(blocks="auto", modules_to_save=[self.head] if self.head else None)


def cases(models: Path, cifar: Path, gsm8k: Path) -> list[Case]:
    """All of them, the cheap ones first."""
    small = [*((name,) for name in ("embeddings", *"012345", "final_norm", "head")), ("all",)]
    vit = [*((name,) for name in ("embeddings", "0", "6", "11", "head")), ("9", "10", "11"), ("all",)]
    late = tuple(str(layer) for layer in range(23, 30))
    smol = [*((name,) for name in ("embeddings", "0", "15", "29")), late, ("all",)]
    photos = partial(images, models / "vit-s14", cifar)
    language = partial(problems, models / "smollm2", gsm8k)
    return [
        Case("ViT, 6 layers, noise", 100, partial(shipped, "noise"), small, (1e-3, 3e-3), None, 5, True),
        Case("ViT, 6 layers, label map", 100, partial(shipped, "label_map"), small, (1e-3, 1e-2), None, 5, True),
        Case("ViT-S/14, 12 layers", 60, photos, vit, (1e-4, 1e-3), "classifier", 1, True),
        Case("SmolLM2, 30 layers", 25, language, smol, (1e-4, 1e-3)),
        Case("SmolLM2, 30 layers", 500, language, [("all",), late, ("29",)], (1e-4, 1e-3)),
    ]


def shipped(recipe: str) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """The shipped ViT on a shift of Fashion-MNIST, 500 images in batches of 32."""
    task = load_task(load_recipe(HERE.parent / "recipes" / f"{recipe}.yaml"), ("train", "validation"))
    split = {}
    for name, examples in task.splits.items():
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
        groups = [order[start : start + 32] for start in range(0, len(order), 32)]
        split[name] = [task.collate([examples[place] for place in group]) for group in groups]
    return task.load_model(), split["train"], split["validation"]


def images(model: Path, data: Path) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """CIFAR-10 at 56 px, batches of 8 for 60 steps, and 480 images to judge by."""
    rows = pd.read_parquet(data / "train.parquet").iloc[:960]
    names = sorted(set(rows.label))
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def pixels(image: Any) -> torch.Tensor:
        picture = Image.open(io.BytesIO(image["bytes"] if isinstance(image, dict) else image)).convert("RGB")
        return (torch.from_numpy(np.array(picture.resize((56, 56)))).permute(2, 0, 1) / 255 - mean) / std

    every = torch.stack([pixels(image) for image in rows.image])
    labels = torch.tensor([names.index(label) for label in rows.label])
    batches = [
        {"pixel_values": every[start : start + 8], "labels": labels[start : start + 8]} for start in range(0, 960, 8)
    ]
    torch.manual_seed(0)
    found = AutoModelForImageClassification.from_pretrained(model, num_labels=len(names))
    return found, batches[:60], batches[60:]


def problems(model: Path, data: Path) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """Problems and answers as one text, in batches of 2 x 64 tokens: 500 to train on, 10 to judge by."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:1000]
    texts = (f"Question: {each['question']}\nAnswer: {each['answer']}\n\n" for each in map(json.loads, lines))
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    rows = ids[: 510 * 128].reshape(510, 2, 64)
    batches = [{"input_ids": row, "labels": row} for row in rows]
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), batches[:500], batches[500:]


def choice(case: Case) -> dict[str, Any]:
    """What is chosen and what it costs, counted and timed: the median of `case.repeats`."""
    model, batches, _ = case.load()
    choose_blocks(model, case.config, batches, budget=Budget(2.0))  # what is loaded once in a process
    timed, steps = [], [seconds_of_a_step(model, batches)]
    for _ in range(case.repeats):
        budget = Budget(half_of(case.steps))
        began = time.process_time()
        chosen, scores = choose_blocks(model, case.config, batches, budget=budget)
        timed.append(time.process_time() - began)
        steps.append(seconds_of_a_step(model, batches))
    ratios = [taken / statistics.fmean(steps[at : at + 2]) / case.steps for at, taken in enumerate(timed)]
    return {
        "blocks": chosen.blocks,
        "batches": scores.num_batches,
        "stages": budget.stages,
        "budget": budget.steps / case.steps,
        "counted": budget.spent / case.steps,
        "timed": statistics.median(ratios),
        "step_seconds": statistics.median(steps),
    }


def free_choice(case: Case) -> dict[str, Any]:
    """What is chosen without a budget, and what it costs, counted."""
    model, batches, _ = case.load()
    budget = Budget()
    chosen, _ = choose_blocks(model, case.config, batches, budget=budget)
    return {"blocks": chosen.blocks, "counted": budget.spent / case.steps}


def seconds_of_a_step(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The median of five full steps that change nothing, after one that warms up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    taken = []
    for batch in batches[:6]:
        began = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def training(case: Case, blocks: Sequence[str], rate: float) -> dict[str, float]:
    """The held-out loss, and the accuracy where there are classes, after the planned steps on some blocks."""
    base, batches, held_out = case.load()
    names = list(BlockMap.find(base).names) if list(blocks) == ["all"] else list(blocks)
    model = get_surgical_model(base, replace(case.config, blocks=names))
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, case.steps)
    model.train()
    for step in range(case.steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        outputs = [model(**batch) for batch in held_out]
    found = {"loss": statistics.fmean(output.loss.item() for output in outputs)}
    if outputs[0].logits.ndim == 2:
        hits = [output.logits.argmax(-1) == batch["labels"] for output, batch in zip(outputs, held_out, strict=True)]
        found["accuracy"] = torch.cat(hits).float().mean().item()
    return found


HEADER = """# What choosing costs within its budget, and how good the choice is

`python benchmarks/choosing.py models CIFAR GSM8K`; see its header. Costs are in trainings of the planned steps:
`counted` is what the library plans by, `timed` what the clock said. Regret is how much better the best candidate is on
held-out batches; the head of ViT-S/14 is new and always trained. `without`: what is chosen without a budget, what
that cost, counted, and what it gives.

| model | steps | budget | counted | timed | how | chosen | it gives | best candidate | regret | without |
| --- | ---: | ---: | ---: | ---: | --- | --- | ---: | --- | ---: | --- |
"""


def table(rows: dict[str, dict[str, Any]], known: Sequence[Case]) -> str:
    """What is measured so far."""
    lines, others = [], []
    for case in known:
        found = rows.get(f"{case.title} | {case.steps} | choice")
        if found is None:
            continue
        own, cells = " + ".join(found["blocks"]), ["", "", "not measured: too dear"]
        free = rows.get(f"{case.title} | {case.steps} | without a budget")
        tried = dict.fromkeys([*([tuple(free["blocks"])] if free else []), tuple(found["blocks"]), *case.candidates])
        judged = {" + ".join(each): best(rows, case, each) for each in tried}
        done = {name: value for name, value in judged.items() if value is not None}
        without = "not measured: too dear"
        if own in done:
            is_loss = done[own] < 0
            told = {name: f"{-value:.3f}" if is_loss else f"{value:.1%}" for name, value in done.items()}
            first = max(done, key=lambda name: done[name])
            regret = done[first] - done[own]
            cells = [
                told[own],
                f"{first}: {told[first]}",
                f"{regret:.3f}" if is_loss else f"{100 * regret:.1f} points",
            ]
            if free:
                name = " + ".join(free["blocks"])
                without = f"{name} ({free['counted']:.2f}): {told.get(name, '')}"
            each = ", ".join(f"{name} {value}" for name, value in told.items())
            rates = " or ".join(f"{rate:g}" for rate in case.rates)
            others.append(f"- {case.title}, {case.steps} steps at {rates}: {'loss' if is_loss else 'accuracy'} {each}")
        costs = [f"{found[key]:.2f}" for key in ("budget", "counted", "timed")]
        row = [case.title, str(case.steps), *costs, "; ".join(found["stages"]), own, *cells, without]
        lines.append(f"| {' | '.join(row)} |")
    return HEADER + "\n".join([*lines, "", "All candidates, each at the better of its rates:", "", *others]) + "\n"


def best(rows: dict[str, dict[str, Any]], case: Case, blocks: Sequence[str]) -> float | None:
    """At the better rate: the accuracy, or minus the loss where there are no classes."""
    found = [rows.get(key_of(case, blocks, rate)) for rate in case.rates]
    values = [row.get("accuracy", -row["loss"]) for row in found if row]
    return max(values) if values else None


def key_of(case: Case, blocks: Sequence[str], rate: float) -> str:
    """Of a training among the numbers."""
    return f"{case.title} | {case.steps} | {' + '.join(blocks)} | {rate}"


def main() -> None:
    """Measure what is missing, and write the table after each."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    known = cases(*map(Path, sys.argv[1:4]))
    rows: dict[str, dict[str, Any]] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}

    def measured(key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in rows:
            rows[key] = measure()
            NUMBERS.write_text(json.dumps(rows, indent=1) + "\n")
            (HERE / "choosing.md").write_text(table(rows, known))
            print(key, rows[key], flush=True)
        return rows[key]

    for case in known:
        key = f"{case.title} | {case.steps} | "
        found = [measured(key + "choice", partial(choice, case))]
        found += [measured(key + "without a budget", partial(free_choice, case))] if case.is_free_too else []
        chosen = [tuple(each["blocks"]) for each in found] if case.candidates else []
        for blocks in dict.fromkeys([*chosen, *case.candidates]):
            for rate in case.rates:
                measured(key_of(case, blocks, rate), partial(training, case, blocks, rate))
    (HERE / "choosing.md").write_text(table(rows, known))


if __name__ == "__main__":
    main()
