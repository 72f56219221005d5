"""A recipe: one flat YAML file that says everything about a training."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import torch
import yaml
from transformers import TrainingArguments

from ... import criteria, policies
from ...criteria.criterion import Criterion
from ...errors import SurgicalError
from ...policies.policy import Policy
from ...policies.stages import check_length, planned_length
from ...procedures.procedure import Procedure, as_procedure
from ...tuner.config import SurgicalConfig
from ...validation import check_count, check_number, nearest, resolve
from .load import StrictLoader, find_folders


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how; the keys of the YAML file.

    Every key that is not listed here is one of `transformers.TrainingArguments`, under its own name
    (`learning_rate`, `num_train_epochs`, `per_device_train_batch_size`, `seed`, `output_dir`, ...). Unlike there,
    nothing is saved during training and nothing is reported unless the recipe says so.

    Attributes:
        model: a folder (relative to the recipe) or a Hub id.
        data: a folder (relative to the recipe) or a Hub id; with the splits train, validation and test.
        task: what kind of model and data, a name from `tasks`.
        columns: which column is what, e.g. `{text: body, label: y}`, where their names and types do not say it.
        metric: what to measure, larger is better: one that ships in `metrics`, a folder (relative to the recipe) with
            a script for `evaluate`, or, with a network, one of the Hub.
        max_length: of a text, in tokens; default is what the model takes.
        new_head: whether the head is made anew, with as many labels as the data have classes; it is then trained and
            saved whatever blocks are chosen.
        corruption, severity: corrupt every image, e.g. `gaussian_noise` at 1 to 5 (as in ImageNet-C).
        character_noise, casing: percent of the characters that are mistyped, or in the other case.
        label_map: new label for each old one, e.g. `[1, 0]`, null to leave a class out; or a mapping from classes to
            labels, which leaves the others out, e.g. `{coat: 0, shirt: 0, boot: 1}`.
        imbalance: share of some classes that is left in the training split, e.g. `{coat: 0.1}`.
        shift_seed: of all that is random in a shift.
        blocks, target_modules, exclude_modules, modules_to_save, criterion, num_blocks, frozen_eval: see
            [`SurgicalConfig`][surgical_peft.SurgicalConfig].
        criterion_options: arguments for the criterion, e.g. `{seed: 3}` for `random`.
        num_batches: how many batches to score on; default is what the criterion asks for.
        policy, policy_options: a name from `policies` and the arguments for it.
        procedure, procedure_options: for `surgical-peft search`: a name from `procedures` and the arguments for it.
        divide: search among these parts of each layer instead of whole layers, e.g. `[attention, mlp]`.
        rates: learning rates; a search tries every candidate at each, instead of at `learning_rate`.
        seeds: a search trains every candidate with each, instead of with `seed`, and takes the mean.
        folds: instead of `seeds`: a search takes the mean over so many parts of the training split, each in turn left
            out of training and measured on; the split `validation` is not used.
        pruner, pruner_options: a class of `optuna.pruners`, such as `MedianPruner`, and the arguments for it; stops
            trainings of a search that look hopeless, see `run_search`.
        methods: for `surgical-peft compare`: names from `methods`, each alone or with its arguments, e.g.
            `[full, head, {lora: {rank: 8}}]`; `rates` and `seeds` are those of each method's trainings.
        sources: for a comparison: further source models, folders or Hub ids, to repeat it with.
        draws: for a comparison: one data set for each of `seeds`, to be used instead of `data` with that seed.
        test_data: for a comparison: the data sets whose test splits, together, all is measured on; default is that of
            the training.
        source_data: for a comparison: data of the task that the source models were trained for, whose test split
            tells what they forget: a folder or Hub id, or keys for the data, e.g. `{data: folder, label_map: [...]}`.
        tiny: for `--tiny`: the config of a small model, e.g. `{model_type: bert, hidden_size: 32}`, see `make_tiny`.
        training: keys for `TrainingArguments`.
        given: for each key of the file its value as written there, and as read: folders are found beside the file.
    """

    model: str
    data: str
    task: str = "image_classification"
    columns: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    max_length: int | None = None
    new_head: bool = False
    corruption: str | None = None
    severity: int = 5
    character_noise: float | None = None
    casing: float | None = None
    label_map: Any = None
    imbalance: dict[str, Any] = field(default_factory=dict)
    shift_seed: int = 0
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
    procedure: str = "sweep"
    procedure_options: dict[str, Any] = field(default_factory=dict)
    divide: list[str] | None = None
    rates: list[float] | None = None
    seeds: list[int] | None = None
    folds: int | None = None
    pruner: str | None = None
    pruner_options: dict[str, Any] = field(default_factory=dict)
    methods: list[Any] | None = None
    sources: list[str] | None = None
    draws: list[str] | None = None
    test_data: list[str] | None = None
    source_data: Any = None
    tiny: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    given: dict[str, tuple[Any, Any]] = field(default_factory=dict, compare=False)

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

    def make_procedure(self) -> Procedure:
        """The procedure of a search."""
        return as_procedure(self.procedure, self.procedure_options)

    def make_pruner(self) -> Any:
        """The pruner of a search, or None."""
        if self.pruner is None:
            return None
        from optuna import pruners

        known = [name for name in pruners.__all__ if name.endswith("Pruner") and name != "BasePruner"]
        if self.pruner not in known:
            raise SurgicalError(
                f"pruner {self.pruner!r} is unknown: {nearest(self.pruner, known)}optuna.pruners has: "
                f"{', '.join(known)}."
            )
        try:
            return getattr(pruners, self.pruner)(**self.pruner_options)
        except (TypeError, ValueError) as error:
            raise SurgicalError(f"pruner_options={self.pruner_options} do not fit {self.pruner}: {error}.") from error

    def settings(self) -> dict[str, Any]:
        """What a training by this recipe is, in plain data: not what is searched for, nor where the results go."""
        others = ("output_dir", "blocks", "criterion", "criterion_options", "num_blocks", "num_batches", "tiny")
        searched = ("procedure", "procedure_options", "rates", "seeds", *_COMPARED)
        return {key: value for key, value in self.keys().items() if key not in others + searched}

    def keys(self) -> dict[str, Any]:
        """The recipe as a file has it: folders as they are written there, and all else as it is now."""
        own = {f.name: f for f in fields(self) if f.name not in ("training", "given")}
        changed = [name for name, each in own.items() if getattr(self, name) != _default(each)]
        found: dict[str, Any] = {}
        for key in dict.fromkeys([*self.given, *changed, *self.training]):
            if key not in own and key not in self.training:
                continue
            value = getattr(self, key) if key in own else self.training[key]
            written, read = self.given.get(key, (value, value))
            found[key] = written if value == read else value
        return found

    def arguments(self, **overrides: Any) -> TrainingArguments:
        """The training arguments: the recipe's, over quiet defaults, under `overrides`."""
        quiet: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
        quiet["dataloader_pin_memory"] = torch.accelerator.is_available()  # else torch warns on every loader
        try:
            return TrainingArguments(**{"output_dir": "runs", **quiet, **self.training, **overrides})
        except (ValueError, TypeError) as error:
            raise SurgicalError(f"transformers.TrainingArguments does not take {self.training}: {error}") from error


def _default(each: Field[Any]) -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default


_OWN = {f.name: get_type_hints(Recipe)[f.name] for f in fields(Recipe) if f.name not in ("training", "given")}
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
    float | None: (float, int, NoneType),
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
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)
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
    given = dict(data)
    training = {key: data.pop(key) for key in list(data) if key not in _OWN}
    data = find_folders(path, data)
    read = {**data, **training}
    recipe = Recipe(**data, training=training, given={key: (value, read[key]) for key, value in given.items()})
    # What is wrong with blocks, policy or arguments is said now, not after the data are loaded.
    recipe.config()
    check_length(recipe.make_policy(), *planned_length(recipe.arguments()))
    _check_search(recipe)
    return recipe


def _check_search(recipe: Recipe) -> None:
    for key in _EXAMPLES:
        values = getattr(recipe, key)
        if values is not None and (not isinstance(values, list) or not values):
            raise SurgicalError(f"{key}: {values!r} is not a list with at least one entry, such as {_EXAMPLES[key]}.")
    for rate in recipe.rates or ():
        check_number("a recipe", "rates", rate, "learning rates such as 1e-3, each a finite number", above=0)
    for seed in recipe.seeds or ():
        check_count("a recipe", "seeds", seed, "each", at_least=0, at_most=2**32 - 1)
    for key in ("rates", "seeds"):
        if len(set(getattr(recipe, key) or ())) != len(getattr(recipe, key) or ()):
            raise SurgicalError(f"{key}: {getattr(recipe, key)} has an entry twice: name it once.")
    if recipe.folds is not None and recipe.folds < 2:
        raise SurgicalError(f"folds: {recipe.folds} is too few: 2 or more.")
    if recipe.folds is not None and recipe.seeds is not None:
        raise SurgicalError("seeds and folds are both given: a search takes the mean over one of them.")
    if recipe.pruner_options and recipe.pruner is None:
        raise SurgicalError(f"pruner_options={recipe.pruner_options} need a pruner that they are for.")


_COMPARED = ("methods", "sources", "draws", "test_data", "source_data")
_EXAMPLES = {"rates": "[1e-3, 3e-3]", "seeds": "[0, 1, 2]", "divide": "[attention, mlp]"}
_EXAMPLES |= {"methods": "[full, head]", "sources": "[other-model]"}
_EXAMPLES |= {"draws": "[target-0, target-1]", "test_data": "[target-0, target-1]"}
