"""unsloth: full fine-tuning with the rest frozen by hand."""

from __future__ import annotations

import re

from ...tuner.target_modules import block_map_for
from .choice import Choice, Emission, quoted

_SCRIPT = """
import re

from unsloth import FastModel

model, tokenizer = FastModel.from_pretrained({source}, full_finetuning=True, load_in_4bit=False)
chosen = re.compile({pattern})
for name, parameter in model.named_parameters():
    parameter.requires_grad_(chosen.search(name) is not None)
names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
assert len(names) == {count}, f"{{len(names)}} tensors are trained instead of {count}: {{names}}"
# Give model and tokenizer to a trainer of TRL, e.g. trl.SFTTrainer.
"""


def unsloth(choice: Choice) -> Emission:
    """A script: unsloth has no argument for chosen weights, and leaves what is frozen after loading as it is.

    Its `finetune_last_n_layers` and `layers_to_transform` choose the layers that get LoRA; where the choice is of
    whole layers alone, a comment gives them.

    Source: unsloth 2026.8.19, `get_peft_model` in unsloth/models/llama.py and vision.py (without effect under
    `full_finetuning`), https://github.com/unslothai/unsloth at 015bdef; `prepare_model_for_training` in
    unsloth_zoo/training_utils.py, which is called while loading, https://github.com/unslothai/unsloth-zoo at ce232d6.

    Raises:
        SurgicalError: the model is no language model, or has LoRA besides.
    """
    choice.check_weights_of_language_model("unsloth")
    notes = [f"LoRA on the same layers instead: FastModel.get_peft_model(model, {how})" for how in _as_lora(choice)]
    script = _SCRIPT.format(source=quoted(choice.source), pattern=quoted(choice.pattern), count=len(choice.parameters))
    trained = frozenset(name for name in choice.names if re.search(choice.pattern, name))
    text = choice.header("unsloth 2026.8.19 (015bdef)", *notes) + script
    return Emission(text, "train_unsloth.py", f"requires_grad of {choice.pattern}", trained)


def _as_lora(choice: Choice) -> list[str]:
    """The argument that gives LoRA to the chosen layers, if they are whole layers of the only stack."""
    config, blocks = choice.config, block_map_for(choice.model, choice.config)
    chosen = config.blocks if isinstance(config.blocks, list) and not config.target_modules else []
    if not chosen or len(blocks.stacks) > 1 or not set(chosen) <= set(blocks.layers):
        return []
    indices = [index for index, name in enumerate(blocks.layers) if name in chosen]
    is_end = indices[0] == len(blocks.layers) - len(indices)
    return [f"finetune_last_n_layers={len(indices)}" if is_end else f"layers_to_transform={indices}"]
