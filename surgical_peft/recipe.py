"""A recipe: one flat YAML file that says everything about a training."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import torch
import yaml
from transformers import TrainingArguments

from . import criteria, policies
from .config import SurgicalConfig
from .criteria.criterion import Criterion
from .errors import SurgicalError
from .names import nearest, resolve
from .policies.policy import Policy


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how; the keys of the YAML file.

    Every key that is not listed here is one of `transformers.TrainingArguments`, under its own name
    (`learning_rate`, `num_train_epochs`, `per_device_train_batch_size`, `seed`, `output_dir`, ...). Unlike there,
    nothing is saved during training and nothing is reported unless the recipe says so.

    Attributes:
        model: a folder (relative to the recipe) or a Hub id.
        data: a folder (relative to the recipe) or a Hub id; with the splits train, validation and test.
        task: what kind of model and data; `image_classification`.
        corruption, severity: corrupt every image, e.g. `gaussian_noise` at 1 to 5 (as in ImageNet-C).
        label_map: new label for each old one, e.g. `[1, 0]`.
        blocks, target_modules, exclude_modules, modules_to_save, criterion, num_blocks, frozen_eval: see
            [`SurgicalConfig`][surgical_peft.SurgicalConfig].
        criterion_options: arguments for the criterion, e.g. `{seed: 3}` for `random`.
        num_batches: how many batches to score on; default is what the criterion asks for.
        policy, policy_options: a name from `policies` and the arguments for it.
        training: keys for `TrainingArguments`.
    """

    model: str
    data: str
    task: str = "image_classification"
    corruption: str | None = None
    severity: int = 5
    label_map: list[int] | None = None
    blocks: Any = "auto"
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: list[str] | None = None
    criterion: str | None = None
    criterion_options: dict[str, Any] = field(default_factory=dict)
    num_blocks: int | None = None
    frozen_eval: bool = True
    num_batches: int | None = None
    policy: str | None = None
    policy_options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def config(self) -> SurgicalConfig:
        """The adapter's config, as the recipe says it."""
        names = {f.name for f in fields(self)} & {f.name for f in fields(SurgicalConfig)}
        return SurgicalConfig(**{name: getattr(self, name) for name in names} | {"criterion": self.make_criterion()})

    def make_criterion(self) -> str | Criterion | None:
        """The criterion with its options, or None."""
        if not self.criterion_options:
            return self.criterion
        if self.criterion is None:
            raise SurgicalError(f"criterion_options={self.criterion_options} need a criterion that they are for.")
        criterion = resolve(self.criterion, criteria)
        known = [
            name for name, each in inspect.signature(criterion).parameters.items() if each.kind == each.KEYWORD_ONLY
        ]
        for name in self.criterion_options:
            if name not in known:
                raise SurgicalError(
                    f"criterion_options={self.criterion_options}: {self.criterion} has no option {name!r}. It has: "
                    f"{', '.join(known) or 'none'}."
                )
        return partial(criterion, **self.criterion_options)

    def make_policy(self) -> Policy | None:
        """The policy, or None."""
        if self.policy is None:
            return None
        try:
            return resolve(self.policy, policies)(**self.policy_options)
        except (TypeError, ValueError) as error:
            if isinstance(error, SurgicalError):
                raise
            raise SurgicalError(f"policy_options={self.policy_options} do not fit {self.policy}: {error}.") from error

    def arguments(self, **overrides: Any) -> TrainingArguments:
        """The training arguments: the recipe's, over quiet defaults, under `overrides`."""
        quiet: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        quiet["dataloader_pin_memory"] = torch.accelerator.is_available()  # else torch warns on every loader
        try:
            return TrainingArguments(**{"output_dir": "runs", **quiet, **self.training, **overrides})
        except (ValueError, TypeError) as error:
            raise SurgicalError(f"transformers.TrainingArguments does not take {self.training}: {error}") from error


_OWN = {f.name: get_type_hints(Recipe)[f.name] for f in fields(Recipe) if f.name != "training"}
_TRAINING = {f.name: get_type_hints(TrainingArguments)[f.name] for f in fields(TrainingArguments) if f.init}
_REFUSED = {
    "resume_from_checkpoint": "a recipe is trained from its start; resume with Trainer in Python",
    "eval_strategy": "a recipe is measured before and after training, not during it",
}
_PLAIN: dict[Any, tuple[type, ...]] = {
    float: (float, int),
    int: (int,),
    bool: (bool,),
    str: (str,),
    int | None: (int, NoneType),
    str | None: (str, NoneType),
    dict[str, Any]: (dict,),
}


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; folders named in it are looked up beside the file.

    Raises:
        SurgicalError: no such file, not YAML, an unknown, duplicate or missing key, or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise SurgicalError(f"there is no recipe {str(path)!r}: give the path of a YAML file.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SurgicalError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise SurgicalError(f"{path} holds no keys: a recipe needs at least model and data.")
    known = {**_OWN, **_TRAINING}
    for key, value in data.items():
        if key not in known:
            raise SurgicalError(
                f"{path}: unknown key {key!r}: {nearest(str(key), known)}Own keys: {', '.join(sorted(_OWN))}; all "
                "others are those of transformers.TrainingArguments."
            )
        if key in _REFUSED:
            raise SurgicalError(f"{path}: {key} is not for recipes: {_REFUSED[key]}.")
        expected = _PLAIN.get(known[key])
        if expected and (not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected)):
            kind = getattr(known[key], "__name__", str(known[key]))
            raise SurgicalError(f"{path}: {key}: {value!r} is not of the type {kind}.")
    missing = {"model", "data"} - data.keys()
    if missing:
        raise SurgicalError(f"{path}: the key {' and '.join(sorted(missing))} is missing.")
    training = {key: data.pop(key) for key in list(data) if key not in _OWN}
    for key in ("model", "data"):
        beside = path.parent / data[key]
        if beside.exists():
            data[key] = str(beside.resolve())
    recipe = Recipe(**data, training=training)
    # What is wrong with blocks, policy or arguments is said now, not after the data are loaded.
    recipe.config()
    recipe.make_policy()
    recipe.arguments()
    return recipe


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads `1e-3` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int):
                raise yaml.MarkedYAMLError(problem=f"{key!r} cannot be a key", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+"), list("-+0123456789")
)
