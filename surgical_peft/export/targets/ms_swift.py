"""ms-swift: `trainable_parameters_regex`."""

from __future__ import annotations

import re

from .choice import Choice, Emission, quoted


def ms_swift(choice: Choice) -> Emission:
    """YAML for `swift sft`, `pt` and `rlhf`: everything is frozen, and what `re.search` finds is trained after all.

    It wins over `freeze_vit` and `freeze_aligner`, which are on by default.

    Source: ms-swift 4.6.0.dev0, `freeze_parameters` and `activate_parameters` in swift/utils/transformers_utils.py,
    docs/source_en/Instruction/Command-line-parameters.md, https://github.com/modelscope/ms-swift at 3602360.

    Raises:
        SurgicalError: the model is no language model, or has LoRA besides.
    """
    choice.check_weights_of_language_model("ms-swift")
    lines = [
        choice.header("ms-swift 4.6 (3602360): swift sft ms_swift.yaml --dataset DATA"),
        f"model: {quoted(choice.source)}\n",
        "tuner_type: full\n",
        "freeze_parameters_ratio: 1.0\n",
        f"trainable_parameters_regex: {quoted(choice.pattern)}\n",
    ]
    trained = frozenset(name for name in choice.names if re.search(choice.pattern, name))
    settings = f"trainable_parameters_regex: {choice.pattern}"
    return Emission("".join(lines), "ms_swift.yaml", settings, trained)
