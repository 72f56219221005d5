"""verl: `freeze_module_pattern`."""

from __future__ import annotations

import re
import shlex

from .choice import Choice, Emission, quoted


def verl(choice: Choice) -> Emission:
    """A shell script with verl's overrides: what `re.search` finds is frozen, so the pattern is of all the others.

    The key comes with pull request 6320, which was open when this was written: a verl without it (0.10.0.dev, 1dda039)
    refuses the override. FSDP 1 takes partly frozen layers with `use_orig_params` only.

    Source: `apply_freeze_to_module` in verl/utils/freeze_utils.py, https://github.com/verl-project/verl at 7cc84ee,
    https://github.com/verl-project/verl/pull/6320.

    Raises:
        SurgicalError: the model is no language model, or has LoRA besides.
    """
    choice.check_weights_of_language_model("verl")
    pattern = f"^(?!{choice.pattern[1:]})"
    overrides = [
        f"actor_rollout_ref.model.path={quoted(choice.source)}",
        f"actor_rollout_ref.model.freeze_module_pattern={quoted(pattern)}",
        "actor_rollout_ref.actor.fsdp_config.use_orig_params=True",
    ]
    lines = [
        choice.header("verl with pull request 6320 (7cc84ee): bash verl.sh data.train_files=FILE"),
        "python3 -m verl.trainer.main_ppo \\\n",
        *(f"    {shlex.quote(override)} \\\n" for override in overrides),
        '    "$@"\n',
    ]
    trained = frozenset(name for name in choice.names if not re.search(pattern, name))
    return Emission("".join(lines), "verl.sh", f"freeze_module_pattern: {pattern}", trained)
