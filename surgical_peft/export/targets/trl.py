"""TRL: `peft_config`."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...tuner.config import SurgicalConfig
from .choice import Choice, Emission, quoted

_WRITTEN = ("blocks", "layers", "target_modules", "exclude_modules", "modules_to_save", "keep_base", "lora")
_SCRIPT = """
from datasets import load_dataset
from surgical_peft import SurgicalConfig, surgical_optimizer
from trl import SFTConfig, SFTTrainer

MODEL = {source}
peft_config = SurgicalConfig({arguments})

if __name__ == "__main__":
    args = SFTConfig(output_dir="runs/trl", learning_rate=2e-5)  # and your own
    trainer = SFTTrainer(
        model=MODEL,
        args=args,
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),  # your data
        peft_config=peft_config,
        optimizer_cls_and_kwargs=surgical_optimizer(args),
    )
    trainer.train()
    trainer.save_model()
"""


def trl(choice: Choice) -> Emission:
    """A script with our own config, which every trainer of TRL takes as its `peft_config`; no choice is beyond it.

    Source: TRL 1.16, `SFTTrainer.__init__` in trl/trainer/sft_trainer.py, which calls `get_peft_model` with any
    `PeftConfig`, https://github.com/huggingface/trl at f2cd577.

    Raises:
        SurgicalError: the model is no language model.
    """
    choice.check_language_model("TRL")
    is_causal = type(choice.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    given = {name: getattr(choice.config, name) for name in _WRITTEN}
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if arguments["keep_base"] == "device":
        del arguments["keep_base"]
    if not choice.config.frozen_eval:
        arguments["frozen_eval"] = False
    if is_causal:
        arguments["task_type"] = "CAUSAL_LM"
    written = ", ".join(f"{name}={_plain(value)!r}" for name, value in arguments.items())
    text = choice.header("TRL 1.16") + _SCRIPT.format(source=quoted(choice.source), arguments=written)
    trained = Choice.of(choice.model, choice.source, SurgicalConfig(**arguments)).parameters
    return Emission(text, "train_trl.py", written, trained)


def _plain(value: Any) -> Any:
    """Sets, as PEFT leaves them in a config, as sorted lists: Python code reads the same each time."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return sorted(value) if isinstance(value, set) else value
