"""Supervised fine-tuning with TRL: only the first two and the last two layers of a language model.

    python recipes/trl_sft.py
    python recipes/trl_sft.py --tiny    # no network: random weights, generated conversations, 2 steps

Needs `pip install surgical-peft "trl>=1.16,<2"`, the network and a GPU. Expected: not measured here (no network); the
tests run the tiny mode, whose numbers mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from surgical_peft import SurgicalConfig, policies, surgical_optimizer
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.training.tiny import NOTICE, STEPS, make_tiny

MODEL = "Qwen/Qwen3-0.6B"
DATA = "trl-lib/Capybara"
BLOCKS = [0, 1, -2, -1]


def train(model: str, data: Dataset, args: SFTConfig) -> SFTTrainer:
    """Tune `BLOCKS` of `model`, each layer at 0.9 times the rate of the one above it, and save the adapter."""
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=SurgicalConfig(blocks=BLOCKS, task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=surgical_optimizer(args, policies.layer_decay(0.9)),
    )
    trainer.train()
    trainer.save_model()
    return trainer


def tiny(folder: Path) -> tuple[str, Dataset]:
    """A model with as many layers and random weights, and conversations about counting."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 28, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    recipe = make_tiny(Recipe(model=MODEL, data=DATA, task="causal_lm", tiny={"model_type": "qwen3", **sizes}), folder)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    tokenizer.chat_template = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}"
    tokenizer.save_pretrained(recipe.model)
    texts = load_dataset("parquet", data_files=f"{recipe.data}/train.parquet", split="train")["text"]
    halves = [text.split(maxsplit=1) for text in texts]
    return recipe.model, Dataset.from_dict({"messages": [[turn("user", a), turn("assistant", b)] for a, b in halves]})


def turn(role: str, content: str) -> dict[str, str]:
    """What one of the two says, as chat templates have it."""
    return {"role": role, "content": content}


def main(arguments: list[str] | None = None) -> SFTTrainer:
    """Run the recipe."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning of chosen layers with TRL.")
    parser.add_argument("--output", default="runs/trl_sft", help="folder for the adapter")
    parser.add_argument("--tiny", action="store_true", help="no network: random weights, generated data, 2 steps")
    given = parser.parse_args(arguments)
    if not given.tiny:
        args = SFTConfig(output_dir=given.output, learning_rate=2e-5, num_train_epochs=1, seed=0)
        return train(MODEL, load_dataset(DATA, split="train"), args)
    print(NOTICE)
    with tempfile.TemporaryDirectory() as folder:
        model, data = tiny(Path(folder))
        args = SFTConfig(f"{given.output}/tiny", learning_rate=1e-2, max_steps=STEPS, bf16=False, report_to="none")
        return train(model, data, args)


if __name__ == "__main__":
    main()
