"""Prompt tuning and chosen blocks in one model: PEFT's virtual tokens before the text, and our adapter in the model.

One `PeftModel` takes adapters of one kind. So the prompt goes around the model with PEFT, and then the blocks into the
model with transformers' own `add_adapter`; in this order, for PEFT freezes all that it finds when it adds a prompt.
Train with any optimizer or with Trainer's own; rates by block (`surgical_optimizer`) do not see through a prompt.

    model = with_prompt_and_blocks(AutoModelForCausalLM.from_pretrained(source), [0, 1])
    Trainer(model=model, ...).train()
    save(model, "adapters")
    model = load(AutoModelForCausalLM.from_pretrained(source), "adapters")
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import PreTrainedModel

from surgical_peft import SurgicalConfig


def with_prompt_and_blocks(
    model: PreTrainedModel, blocks: list[int | str], tokens: int = 8, task_type: str = TaskType.CAUSAL_LM
) -> PeftModel:
    """The model with so many trainable virtual tokens before each text, and these blocks trainable."""
    prompted = get_peft_model(model, PromptTuningConfig(task_type=task_type, num_virtual_tokens=tokens))
    model.add_adapter(SurgicalConfig(blocks=blocks))
    return prompted


def save(model: PeftModel, folder: str | Path) -> None:
    """Write both adapters, each to a folder of its own; PEFT puts the blocks into the prompt's file as well."""
    model.save_pretrained(Path(folder) / "prompt")
    model.base_model.save_pretrained(Path(folder) / "blocks")


def load(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The source model with both adapters, to use."""
    model.load_adapter(str(Path(folder) / "blocks"))
    return PeftModel.from_pretrained(model, Path(folder) / "prompt")
