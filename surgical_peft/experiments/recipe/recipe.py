"""A recipe in Python: the sections of a flat YAML file as one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ...policies.stages import check_length, planned_length
from ...typed_json import default_of
from .code import check_code, check_writes, code_of
from .sections import CompareSection, DataSection, PolicySection, SearchSection, SelectionSection, names_of
from .training_arguments import make_arguments

ONLINE = "online"  # a value of `unlabelled`
NOT_KEYS = ("training", "given", "path", "allow_code")
_NO_SETTINGS = {  # of a training: where its results go, what is measured afterwards, and what is searched for
    *("output_dir", "prefix_cache", "blocks", "criterion", "criterion_options", "num_blocks", "num_batches", "tiny"),
    "test_metrics",
    *("procedure", "procedure_options", "rates", "seeds", *names_of(CompareSection)),
}


@dataclass(frozen=True, kw_only=True)
class Recipe(CompareSection, SearchSection, PolicySection, SelectionSection, DataSection):
    """All that a training needs to be repeated; the attributes of its sections are the keys of the YAML file.

    Every other key of the file is one of `transformers.TrainingArguments`, under its own name (`learning_rate`,
    `num_train_epochs`, `per_device_train_batch_size`, `seed`, `output_dir`, ...). Unlike there, nothing is saved
    during training and nothing is reported unless the recipe says so.

    Attributes:
        tiny: for `--tiny`: the config of a small model, e.g. `{model_type: bert, hidden_size: 32}`, see `make_tiny`.
        training: keys for `TrainingArguments`.
        given: for each key of the file its value as written there, and as read: folders are found beside the file.
        path: of the file; None if it is not known.
        allow_code: run code that is not the user's own: what a recipe from elsewhere names, metrics of the Hub, and
            what lies beside a model (the `trust_remote_code` of transformers).

    Example:
        >>> recipe = Recipe(model="vit", data="target-0", blocks=[0], training={"learning_rate": 1e-3})
        >>> recipe.config().blocks
        [0]
    """

    tiny: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    given: dict[str, tuple[Any, Any]] = field(default_factory=dict, compare=False)
    path: Path | None = field(default=None, compare=False)
    allow_code: bool = field(default=False, compare=False)

    @property
    def is_online(self) -> bool:
        """Whether what is measured is a stream that the model adapts to on the way."""
        return self.unlabelled == ONLINE

    def settings(self) -> dict[str, Any]:
        """The keys that a training depends on, in plain data: not what is searched for, nor where the results go."""
        return {key: value for key, value in self.keys().items() if key not in _NO_SETTINGS}

    def keys(self) -> dict[str, Any]:
        """The recipe as a file has it: folders as they are written there, and all else as it is now."""
        defaults = {entry.name: default_of(entry) for entry in fields(self) if entry.name not in NOT_KEYS}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        keys: dict[str, Any] = {}
        for key in dict.fromkeys([*self.given, *changed, *self.training]):
            if key not in defaults and key not in self.training:
                continue
            value = getattr(self, key) if key in defaults else self.training[key]
            written, read = self.given.get(key, (value, value))
            keys[key] = written if value == read else value
        return keys

    def check(self) -> None:
        """Make the criterion and the policy.

        Raises:
            SurgicalError: they do not fit, or are code that may not run.
        """
        self.config()
        check_length(self.make_policy(), *planned_length(self.arguments()))

    def check_run(self, output: str | Path | None = None) -> None:
        """Make sure that the recipe may run, and check with its code what `load_recipe` could not without.

        Args:
            output: the folder for the results, where it is not the recipe that says so.

        Raises:
            SurgicalError: the code may not run or does not fit, or results may not go there: see `check_code` and
                `check_writes`.
        """
        check_code(self)
        check_writes(self, output)
        if code_of(self):
            self.check()

    def arguments(self, **overrides: Any) -> TrainingArguments:
        """The training arguments: the recipe's, over quiet defaults, under `overrides`.

        Raises:
            SurgicalError: transformers does not take them.
        """
        quiet: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        quiet["dataloader_pin_memory"] = torch.accelerator.is_available()  # else torch warns on every loader
        if self.is_online:  # a stream is gone through once, a step an image, at one rate
            quiet |= {"per_device_train_batch_size": 1, "num_train_epochs": 1, "lr_scheduler_type": "constant"}
        if self.early_stopping_patience is not None:
            quiet |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
            quiet |= {"metric_for_best_model": "loss", "save_total_limit": 1}
        if {**quiet, **self.training, **overrides}.get("eval_strategy", "no") != "no":
            quiet["label_names"] = ["labels"]  # Trainer does not see them through an adapter
        return make_arguments({**self.training, **overrides}, {"output_dir": "runs", **quiet})
