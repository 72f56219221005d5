"""PEFT's method comparison on MetaMathQA: the middle 5 of the 28 blocks of Llama-3.2-3B, an entry in its own format.

    python recipes/peft_method_comparison/metamathqa.py           # what the run needs; no data, no weights, 1 minute
    python recipes/peft_method_comparison/metamathqa.py --tiny    # its steps, on random weights and generated rows

Expected: the first prints the table in README.md; the second trains 4 steps in half a minute, and stops if a weight
outside of the five blocks has changed or the saved adapter is not theirs. The run itself needs a GPU of 24 GiB:
README.md has the command. It has not been run: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from surgical_peft import BlockMap  # registers SURGICAL with PEFT
from surgical_peft.experiments.training.profiling import LiveTensors
from surgical_peft.experiments.training.tiny import NOTICE
from surgical_peft.rendering import markdown_row

HERE = Path(__file__).parent
ENTRY = HERE / "experiments" / "surgical" / "llama-3.2-3B-middle5"
ARCHITECTURE = HERE / "llama-3.2-3B"  # its sizes; with 3,212,749,824 parameters, as PEFT's results have it
# method_comparison/MetaMathQA/default_training_params.json and results/*.json of huggingface/peft at 5d602fd
DEFAULTS: dict[str, Any] = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "init_kv_cache_prefix": None,
}
PUBLISHED = {"full fine-tuning": (36.2, 2147), "LoRA, rank 32": (20.8, 942)}  # GiB reserved at most, seconds; an L40S
TOKENS = round(4_198_051 / 20_000)  # of an example, on average, in these results
LONG, MOST = 512, 768  # tokens of the longest examples: what the published memory comes to, and where they are cut
CARD = 24  # GiB
GIB = 2**30


def read_entry(folder: Path = ENTRY) -> tuple[PeftConfig, dict[str, Any]]:
    """The two files as PEFT reads them: any method's config, and what differs from the default training parameters."""
    given = json.loads((folder / "training_params.json").read_text(encoding="utf-8"))
    if unknown := sorted(given.keys() - DEFAULTS.keys()):
        raise SystemExit(f"{folder} gives {unknown[0]}, and PEFT takes {', '.join(DEFAULTS)}")
    return PeftConfig.from_pretrained(str(folder)), {**DEFAULTS, **given}


def optimizer_of(model: nn.Module, params: dict[str, Any], **kwargs: Any) -> torch.optim.Optimizer:
    """As PEFT makes it: of all parameters; those without a gradient have no state."""
    optimizer: torch.optim.Optimizer = getattr(torch.optim, params["optimizer_type"])(
        model.parameters(), **params["optimizer_kwargs"], **kwargs
    )
    return optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], params: dict[str, Any]) -> Any:
    """One training step; returns the loss."""
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), params["grad_norm_clip"])
    optimizer.step()
    return loss.detach()


# What the run needs


def needs() -> dict[str, dict[str, float]]:
    """Print what each method needs, from two steps without numbers (on the meta device)."""
    config, params = read_entry()
    methods = {
        "full fine-tuning": None,
        "LoRA, rank 32": LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM"),
        ENTRY.name.removeprefix("llama-3.2-3B-"): config,
    }
    costs = {name: cost(method, params) for name, method in methods.items()}
    over = max(published / costs[name]["peak"] for name, (published, _) in PUBLISHED.items())
    seconds = time_by(costs)
    rows = []
    for name, c in costs.items():
        reserved, measured = PUBLISHED.get(name, (c["peak"] * over, seconds(c)))
        about = "" if name in PUBLISHED else "about "
        sizes = [f"{c[key]:.1f}" for key in ("weights", "optimizer", "peak", "most")]
        last = [f"{about}{reserved:.1f}", f"{c['tflop']:.1f}", f"{about}{measured / 60:.0f}"]
        rows.append([name, f"{c['trained']:,.0f}", *sizes, *last])
    titles = [
        "",
        "trained",
        "weights",
        "optimizer",
        f"peak, 4 x {LONG}",
        f"4 x {MOST}",
        "reserved",
        "TFLOP",
        "minutes",
    ]
    print(*map(markdown_row, [titles, ["---", *["---:"] * 8], *rows]), sep="\n")
    own = costs[list(costs)[-1]]
    print(
        "\nMemory in GiB, of steps of 4 examples of so many tokens. Reserved and minutes (5,000 steps and the tests,"
        "\non an L40S) are those that PEFT published. The entry's follow from them: "
        f"{over:.2f} times its peak, and by the"
        f"\noperations of a step and the weights that are trained.\nDisk: {own['base']:.1f} GiB of the base model, "
        f"{own['file']:.1f} GiB of the adapter (gone with --clean), and the data sets.\nA GPU of {CARD} GiB is "
        f"{'enough' if own['peak'] * over < CARD else 'not enough'}."
    )
    return costs


def cost(method: PeftConfig | None, params: dict[str, Any]) -> dict[str, float]:
    """Sizes in GiB, and the operations of a step of usual length in TFLOP."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(ARCHITECTURE)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, params["dtype"]))
    base = model.num_parameters() * model.dtype.itemsize / GIB
    if method is not None:
        model = get_peft_model(model, method, autocast_adapter_dtype=params["autocast_adapter_dtype"])
    model.train()
    peaks = {}
    for length in (LONG, MOST):
        optimizer = optimizer_of(model, params, foreach=True)  # as on a GPU
        with LiveTensors() as tensors:
            for tensor in (*model.state_dict().values(), *model.buffers()):  # those that are parked as well
                tensors.count(tensor)
            weights = tensors.bytes
            for _ in range(2):  # the first has no state of the optimizer yet
                step(model, optimizer, without_numbers(params["batch_size"], length), params)
        peaks[length] = tensors.peak / GIB
    state = [value for values in optimizer.state.values() for value in values.values()]
    with FlopCounterMode(display=False) as flops:
        step(model, optimizer, without_numbers(params["batch_size"], TOKENS), params)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "trained": sum(parameter.numel() for parameter in trained),
        "weights": weights / GIB,
        "optimizer": sum(value.nbytes for value in state if value.is_meta) / GIB,
        "peak": peaks[LONG],
        "most": peaks[MOST],
        "tflop": flops.get_total_flops() / 1e12,
        "base": base,
        "file": sum(parameter.nbytes for parameter in trained) / GIB,
    }


def without_numbers(size: int, length: int) -> dict[str, Any]:
    """A batch on the meta device; of whole examples, for a mask of which it would have to see the numbers."""
    ids = torch.zeros(size, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids, "num_items_in_batch": size * length}


def time_by(costs: dict[str, dict[str, float]]) -> Any:
    """Seconds by the operations of a step and the weights that are trained, such that the published two come out."""
    table = torch.tensor([[costs[name]["tflop"], costs[name]["trained"] / 1e9] for name in PUBLISHED])
    rates = torch.linalg.solve(table, torch.tensor([float(seconds) for _, seconds in PUBLISHED.values()]))
    return lambda c: float(rates @ torch.tensor([c["tflop"], c["trained"] / 1e9]))


# The same steps, tiny


def tiny(output: Path) -> dict[str, Any]:
    """Train the entry's blocks of a small random Llama of 28 layers, by the steps of PEFT's run."""
    config, params = read_entry()
    params |= {"max_steps": 4, "eval_steps": 2, "max_seq_length": 96}
    torch.manual_seed(params["seed"])
    tokenizer = letters()
    model = get_peft_model(small(tokenizer, params), config, autocast_adapter_dtype=params["autocast_adapter_dtype"])
    before = {name: weight.clone() for name, weight in model.get_base_model().named_parameters()}
    optimizer = optimizer_of(model, params)
    warmup = int(0.1 * params["max_steps"])
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, params["max_steps"])
    prose = [f"The number {number} comes before {number + 1}." for number in range(params["batch_size"])]
    model.eval()
    with model.disable_adapter():
        loss_before = prose_loss(model, tokenizer, prose)
    model.train()
    train, test = rows(24), rows(8, start=100)
    metrics: list[dict[str, Any]] = []
    for number, batch in zip(range(1, params["max_steps"] + 1), batches(train, tokenizer, params), strict=False):
        loss = step(model, optimizer, batch, params)
        scheduler.step()
        if number % params["eval_steps"] == 0:
            accuracy = share_right(model.eval(), tokenizer, test[:4], params)
            metrics.append({"step": number, "valid accuracy": accuracy, "train loss": float(loss)})
            model.train()
    accuracy = share_right(model.eval(), tokenizer, test, params)
    forgetting = prose_loss(model, tokenizer, prose) - loss_before
    metrics.append({"step": number, "test accuracy": accuracy, "forgetting": forgetting})
    model.save_pretrained(output)
    check(model, before, output)
    trained, _ = model.get_nb_trainable_parameters()
    size = (output / "adapter_model.safetensors").stat().st_size
    return {"num_trainable_params": trained, "file_size": size, "blocks": config.blocks, "metrics": metrics}


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, padded as PEFT pads: on the right, with the end of the text."""
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(code): code - 30 for code in range(32, 127)}, "\n": 97}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", padding_side="right"
    )


def small(tokenizer: PreTrainedTokenizerFast, params: dict[str, Any]) -> Any:
    """A Llama with as many layers, in the precision of the run."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(**{**json.loads((ARCHITECTURE / "config.json").read_text()), **sizes})
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, params["dtype"]))


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Problems in the form of MetaMathQA, with the columns that PEFT takes."""
    draw = random.Random(start)
    pairs = [(draw.randrange(2, 9), draw.randrange(2, 9)) for _ in range(count)]
    return [
        {"query": f"What is {a} plus {b}?", "response": f"{a} + {b} = {a + b}\nThe answer is: {a + b}"}
        for a, b in pairs
    ]


def batches(data: list[dict[str, str]], tokenizer: Any, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Batches of like length, the longest first; of the padding only the first token is learned: the end."""
    texts = [params["query_template"].format(query=row["query"]) + row["response"] for row in data]
    encoded = sorted(tokenizer(texts, truncation=True, max_length=params["max_seq_length"])["input_ids"], key=len)[
        ::-1
    ]
    for start in range(0, len(encoded), params["batch_size"]):
        part = encoded[start : start + params["batch_size"]]
        batch = dict(tokenizer.pad({"input_ids": part}, return_tensors="pt"))
        labels = batch["input_ids"].clone()
        for line, ids in zip(labels, part, strict=True):
            line[len(ids) + 1 :] = -100
        yield {**batch, "labels": labels, "num_items_in_batch": batch["attention_mask"].sum().item()}


@torch.inference_mode()
def prose_loss(model: nn.Module, tokenizer: Any, texts: list[str]) -> float:
    """The loss of texts that are not trained on, of which the rise is what PEFT calls forgetting."""
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return float(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss)


@torch.inference_mode()
def share_right(model: Any, tokenizer: Any, data: list[dict[str, str]], params: dict[str, Any]) -> float:
    """The share of problems whose answer the model writes."""
    texts = [params["query_template"].format(query=row["query"]) for row in data]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    config = GenerationConfig(max_new_tokens=8, pad_token_id=tokenizer.pad_token_id)
    kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
    written = tokenizer.batch_decode(model.generate(**kept, generation_config=config), skip_special_tokens=True)
    right = [
        text.rpartition("The answer is: ")[-1].strip() == row["response"].rpartition(": ")[-1]
        for text, row in zip(written, data, strict=True)
    ]
    return sum(right) / len(right)


def check(model: Any, before: dict[str, torch.Tensor], output: Path) -> None:
    """Make sure that the entry's blocks have changed, no bit of any other has, and the file holds what was trained."""
    config = model.peft_config["default"]
    blocks = BlockMap.find(model)
    after = dict(model.get_base_model().named_parameters())
    changed = {blocks.block_of(name) for name, weight in after.items() if not weight.equal(before[name])}
    if changed != set(config.blocks):
        raise SystemExit(f"blocks {sorted(changed)} have changed, and {sorted(config.blocks)} were to be tuned")
    saved = load_file(output / "adapter_model.safetensors")
    if not all(weight.equal(after[name.removeprefix("base_model.model.")]) for name, weight in saved.items()):
        raise SystemExit("the adapter that was saved is not the one that was trained")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Say what the run needs, or try its steps."""
    parser = argparse.ArgumentParser(description="The entry for PEFT's method comparison on MetaMathQA.")
    parser.add_argument("--tiny", action="store_true", help="train on random weights and generated rows, 4 steps")
    if not parser.parse_args(arguments).tiny:
        return needs()
    print(NOTICE)
    with tempfile.TemporaryDirectory() as folder:
        report = tiny(Path(folder))
    print(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
