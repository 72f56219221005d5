"""axolotl: `unfrozen_parameters`."""

from __future__ import annotations

import re

from .choice import Choice, Emission, literal, quoted


def axolotl(choice: Choice) -> Emission:
    """YAML for `axolotl train`: a list of patterns, of which `re.match` has to find one in a parameter's name.

    A dot stands for itself there, unless a plus follows; a range in brackets at the end would be one of rows.

    Source: axolotl 0.18.0, `freeze_layers_except` in src/axolotl/utils/freeze.py and `unfrozen_parameters` in
    src/axolotl/utils/schemas/config.py, https://github.com/axolotl-ai-cloud/axolotl at 067b021.

    Raises:
        SurgicalError: the model is no language model, or has LoRA besides.
    """
    choice.check_weights_of_language_model("axolotl")
    patterns = [f"^{literal(path, '.')}" for path in choice.paths]
    rules = [re.compile(re.sub(r"\.(?!\+)", r"\\.", pattern)) for pattern in patterns]
    lines = [
        choice.header("axolotl 0.18.0 (067b021): add it to your config, which has no adapter"),
        f"base_model: {quoted(choice.source)}\n",
        "unfrozen_parameters:\n",
        *(f"  - {quoted(pattern)}\n" for pattern in patterns),
        "gradient_checkpointing_kwargs:\n  use_reentrant: false\n",
    ]
    trained = frozenset(name for name in choice.names if any(rule.match(name) for rule in rules))
    return Emission("".join(lines), "axolotl.yaml", f"unfrozen_parameters: {patterns}", trained)
