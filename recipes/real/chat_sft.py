"""Instruction following with TRL: the last third of SmolLM2 learns to answer problems of GSM8K in its chat template.

    python recipes/real/chat_sft.py
    python recipes/real/chat_sft.py --tiny    # no data needed: random weights, generated chats, 2 steps

Needs `make real-data` once (on the Hub HuggingFaceTB/SmolLM2-135M-Instruct and openai/gsm8k) and
`pip install "trl>=1.16,<2"`. Only the assistant's words count in the loss, and only layers 20 to 29 train: the command
stops if any other weight is not bit for bit what it was, or if the saved adapter does not give the same loss again.

Expected (seed 0, one core that other work shared): the loss of the 40 validation chats falls from 1.454 to 1.124 in 30
steps of two, all checks passed, in 165 s and 2 minutes of measuring. It answers in the form of GSM8K, and not rightly.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from surgical_peft import BlockMap, SurgicalConfig, surgical_optimizer
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.training.tiny import NOTICE, STEPS, make_tiny

REAL = Path(__file__).parents[2] / "data" / "real"
BLOCKS = "20:30"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 30, "num_attention_heads": 2}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def train(model: str, data: dict[str, Dataset], args: SFTConfig) -> dict[str, Any]:
    """Tune `BLOCKS`, save the adapter, load it again, and say what became of the loss of the validation chats."""
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    trainer = SFTTrainer(
        model=base,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        peft_config=SurgicalConfig(blocks=[BLOCKS], task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=surgical_optimizer(args),
    )
    losses = [trainer.evaluate()["eval_loss"]]
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    losses.append(trainer.evaluate()["eval_loss"])
    trainer.save_model()
    merged = trainer.model.merge_and_unload()
    check_frozen(merged, before)
    again = AutoModelForCausalLM.from_pretrained(model)
    loaded = PeftModel.from_pretrained(again, args.output_dir).merge_and_unload().state_dict()
    if not all(torch.equal(weight, loaded[name]) for name, weight in merged.state_dict().items()):
        raise SystemExit("the adapter that was saved is not the one that was trained")
    return {"loss before": losses[0], "loss after": losses[1], "seconds": seconds, "answer": answer(merged, tokenizer)}


def check_frozen(model: Any, before: dict[str, torch.Tensor]) -> None:
    """Make sure that the chosen blocks have changed, and not a bit of any other."""
    blocks = BlockMap.find(model)
    tuned = set(blocks.parse([BLOCKS]))
    changed = {blocks.block_of(name) for name, weight in model.state_dict().items() if not weight.equal(before[name])}
    if changed != tuned:
        raise SystemExit(f"blocks {sorted(changed)} have changed, and {sorted(tuned)} were to be tuned")


def answer(model: Any, tokenizer: Any) -> str:
    """What the model writes to a problem that it has not seen."""
    chat = [{"role": "user", "content": "Ann has 3 boxes of 4 pens and gives 5 pens away. How many are left?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def chat(question: str, reply: str) -> dict[str, Any]:
    """A turn and its answer, which alone is learned."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": reply}],
    }


def problems(folder: Path) -> dict[str, Dataset]:
    """The problems that `make real-data` has drawn, as chats."""
    if not folder.is_dir():
        raise SystemExit(f"there is no folder {folder}: make real-data writes it, from openai/gsm8k of the Hub.")
    made = {}
    for split in ("train", "validation"):
        rows = map(json.loads, (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        questions = ((row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:"), row) for row in rows)
        made[split] = Dataset.from_list([chat(text, row["completion"].strip()) for text, row in questions])
    return made


def tiny(folder: Path) -> tuple[str, dict[str, Dataset]]:
    """A model with as many layers and random weights, and chats about counting."""
    recipe = Recipe(model="smollm2", data="gsm8k", task="causal_lm", tiny={"model_type": "llama", **SIZES})
    recipe = make_tiny(recipe, folder)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(recipe.model)
    texts = load_dataset("parquet", data_files=f"{recipe.data}/train.parquet", split="train")["text"]
    rows = Dataset.from_list([chat(*text.split(maxsplit=1)) for text in texts])
    return recipe.model, {"train": rows, "validation": rows.select(range(4))}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning of the last third of a chat model.")
    parser.add_argument("--output", default="runs/chat_sft", help="folder for the adapter")
    parser.add_argument("--tiny", action="store_true", help="no data needed: random weights, generated data, 2 steps")
    given = parser.parse_args(arguments)
    settings: dict[str, Any] = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 8, "bf16": False}
    settings |= {"gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    if not given.tiny:
        args = SFTConfig(given.output, learning_rate=1e-4, max_steps=30, logging_steps=5, seed=0, **settings)
        found = train(str(REAL / "smollm2"), problems(REAL / "gsm8k"), args)
        print(json.dumps(found, indent=1))
        return found
    print(NOTICE)
    with tempfile.TemporaryDirectory() as folder:
        model, data = tiny(Path(folder))
        args = SFTConfig(f"{given.output}/tiny", learning_rate=1e-2, max_steps=STEPS, use_cpu=True, **settings)
        return train(model, data, args)


if __name__ == "__main__":
    main()
