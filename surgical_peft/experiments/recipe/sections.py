"""The sections of a recipe: the keys of each command, with what is made of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from ... import criteria, policies
from ...criteria.criterion import Criterion
from ...errors import SurgicalError
from ...policies.policy import Policy
from ...procedures.procedure import Procedure, as_procedure
from ...tuner.config import SurgicalConfig
from ...validation import call_with_options, nearest, resolve
from .code import check_code, resolve_key


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Model and data.

    Attributes:
        model: a folder (relative to the recipe) or a Hub id.
        data: a folder or file (relative to the recipe) or a Hub id; CSV, JSON, Parquet or images. Without a split
            `validation`, a fifth of `train` is held out; without `test`, nothing is measured on it.
        data_config: which configuration of a data set with several, e.g. `sst2` of `nyu-mll/glue`.
        splits: the data's name for a split, where it has another, e.g. `{validation: dev}`; null for none,
            e.g. `{test: null}` where the test split has no labels.
        drop_empty: whether rows with empty cells, and with images that cannot be read, are left out.
        task: the kind of model and data, a name from `tasks` or `package.module:name`.
        columns: which column is what, e.g. `{text: body, label: y}`, where their names and types do not say it.
        metric: what to measure, larger is better: one that ships in `metrics`, a folder (relative to the recipe) with
            a script for `evaluate`, or, with a network and `--allow-code`, one of the Hub; default is the
            task's.
        test_metrics: further metrics of the test split alone, for `train` and `compare`, each with how many of its
            examples are measured, evenly spread, e.g. `{exact_number: 100}`; null for all.
        max_length: of a text, in tokens; default is what the model takes.
        max_new_tokens: of an answer that a `causal_lm` model writes to be measured, in tokens; default is 256.
        new_head: whether the head is made anew, with as many labels as the data have classes; it is then trained and
            saved whatever blocks are chosen.
        problem_type: what a classification task predicts: `single_label_classification` (default),
            `multi_label_classification` of lists of classes, or `regression` of numbers.
        class_weights: `balanced` or a list of weights of the labels in the loss; default is 1 for all.
        unlabelled: whether images are trained on without their labels, by the entropy of the mean prediction over
            augmented copies of each (MEMO): `true` trains on `train`; `online` takes one step on each image of
            `validation` and of `test`, in their order, before it is predicted.
        copies: augmented copies of each image, with `unlabelled`; a step costs so many times as much.
        corruption: corrupt every image, e.g. by `gaussian_noise` (as in ImageNet-C) or `cifar10_c/gaussian_noise`
            (as in CIFAR-10-C, for images of 32 x 32 pixels).
        severity: of the corruption, 1 to 5.
        character_noise: percent of the characters of a text that are mistyped.
        casing: percent of the characters of a text that are in the other case.
        label_map: new label for each old one, e.g. `[1, 0]`, null to leave a class out; or a mapping from classes to
            labels, which leaves the others out, e.g. `{coat: 0, shirt: 0, boot: 1}`.
        imbalance: share of some classes that is left in the training split, e.g. `{coat: 0.1}`.
        shift_seed: seed of all random shifts, and of the rows that are held out.
    """

    model: str
    data: str
    data_config: str | None = None
    splits: dict[str, str | None] = field(default_factory=dict)
    drop_empty: bool = False
    task: str = "image_classification"
    columns: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    test_metrics: dict[str, int | None] = field(default_factory=dict)
    max_length: int | None = None
    max_new_tokens: int | None = None
    new_head: bool = False
    problem_type: str | None = None
    class_weights: str | list[float] | None = None
    unlabelled: bool | str = False
    copies: int = 8
    corruption: str | None = None
    severity: int = 5
    character_noise: float | None = None
    casing: float | None = None
    label_map: list[int | None] | dict[str | int, int | None] | None = None
    imbalance: dict[str, Any] = field(default_factory=dict)
    shift_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SelectionSection:
    """Blocks, and how to choose them; for `surgical-peft score` and `train`.

    Attributes:
        blocks: the blocks to tune, by index, slice or name, e.g. `[0, "-2:", head]`; `auto` chooses them by scores.
        target_modules: tune only these modules inside the blocks, e.g. `[attention]`; alone, as in PEFT.
        exclude_modules: modules to leave out, matched as `target_modules`.
        modules_to_save: modules to train and save as well; default is a new head, if there is one.
        criterion: what scores the blocks, a name from `criteria` or `package.module:name`; default is `probe`.
        num_blocks: with `auto`, how many blocks to take; default: short trainings decide.
        frozen_eval: whether the frozen blocks run in eval mode, without dropout.
        criterion_options: arguments for the criterion, e.g. `{seed: 3}` for `random`.
        num_batches: how many batches to score on; default is what the criterion asks for.
    """

    blocks: str | int | list[str | int] | None = "auto"
    target_modules: str | list[str] | dict[str, Any] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    criterion: str | None = None
    criterion_options: dict[str, Any] = field(default_factory=dict)
    num_blocks: int | None = None
    frozen_eval: bool = True
    num_batches: int | None = None

    def config(self) -> SurgicalConfig:
        """The adapter's config.

        Raises:
            SurgicalError: as `SurgicalConfig` and `make_criterion`.
        """
        names = {f.name for f in fields(SelectionSection)} & {f.name for f in fields(SurgicalConfig)}
        return SurgicalConfig(**{name: getattr(self, name) for name in names} | {"criterion": self.make_criterion()})

    def make_criterion(self) -> str | Criterion | None:
        """The criterion with its options, or None.

        Raises:
            SurgicalError: options without a criterion, an unknown criterion, an option that it does not have, or
                code that may not run.
        """
        check_code(self, "criterion")
        if not self.criterion_options:
            return self.criterion
        if self.criterion is None:
            raise SurgicalError(f"criterion_options={self.criterion_options} need a criterion that they are for.")
        criterion = resolve(self.criterion, criteria)
        parameters = inspect.signature(criterion).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
        for name in self.criterion_options:
            if name not in known:
                raise SurgicalError(
                    f"criterion_options={self.criterion_options}: {self.criterion} has no option {name!r}. It has: "
                    f"{', '.join(known) or 'none'}."
                )
        return partial(criterion, **self.criterion_options)


@dataclass(frozen=True, kw_only=True)
class PolicySection:
    """Learning rates and masks in training.

    Attributes:
        policy: a name from `policies` or `package.module:name`; default is one learning rate for all blocks.
        policy_options: arguments for the policy, e.g. `{decay: 0.8}` for `layer_decay`.
        norm_eval: whether batch normalization keeps its running statistics, also in blocks that are tuned; its weights
            train all the same.
        early_stopping_patience: after so many epochs without a lower validation loss `train` stops, and keeps the best
            epoch; `search`, `compare` and `advise` train to the end. Default is not to stop.
        prefix_cache: whether `train` runs what lies before the first tuned block once for each example, and keeps what
            it returns: 2 GiB in memory, the rest beside the results until the training is done. `search` and `compare`
            do so by themselves, up to 2 GiB.
    """

    policy: str | None = None
    policy_options: dict[str, Any] = field(default_factory=dict)
    norm_eval: bool = False
    early_stopping_patience: int | None = None
    prefix_cache: bool = False

    def make_policy(self) -> Policy | None:
        """The policy, or None.

        Raises:
            SurgicalError: an unknown policy, options that it does not take, something else than a policy, or code
                that may not run.
        """
        if self.policy is None:
            return None
        function = resolve_key(self, "policy", policies)
        return call_with_options("policy_options", self.policy, function, self.policy_options, gives=Policy)


@dataclass(frozen=True, kw_only=True)
class SearchSection:
    """For `surgical-peft search`; `rates` and `seeds` also for `compare`, `rates` also for `advise`.

    Attributes:
        procedure: what to try next, a name from `procedures` or `package.module:name`.
        procedure_options: arguments for the procedure, e.g. `{num_blocks: 3}` for `greedy_forward`.
        divide: search among these parts of each layer instead of whole layers, e.g. `[attention, mlp]`.
        rates: learning rates; every candidate is tried at each, instead of at `learning_rate`.
        seeds: every candidate is trained with each, instead of with `seed`, and the mean counts.
        folds: instead of `seeds`: the mean over so many parts of the training split, each in turn left out of training
            and measured on; the split `validation` is not used.
        pruner: a class of `optuna.pruners`, such as `MedianPruner`; stops trainings that look hopeless.
        pruner_options: arguments for the pruner.
    """

    procedure: str = "sweep"
    procedure_options: dict[str, Any] = field(default_factory=dict)
    divide: list[str] | None = None
    rates: list[float] | None = None
    seeds: list[int] | None = None
    folds: int | None = None
    pruner: str | None = None
    pruner_options: dict[str, Any] = field(default_factory=dict)

    def make_procedure(self) -> Procedure:
        """The procedure of a search.

        Raises:
            SurgicalError: an unknown procedure, options that it does not take, or code that may not run.
        """
        check_code(self, "procedure")
        return as_procedure(self.procedure, self.procedure_options)

    def make_pruner(self) -> Any:
        """The pruner of a search, or None.

        Raises:
            SurgicalError: an unknown pruner, or options that it does not take.
        """
        if self.pruner is None:
            return None
        from optuna import pruners

        known = [name for name in pruners.__all__ if name.endswith("Pruner") and name != "BasePruner"]
        if self.pruner not in known:
            raise SurgicalError(
                f"pruner {self.pruner!r} is unknown: {nearest(self.pruner, known)}optuna.pruners has: "
                f"{', '.join(known)}."
            )
        return call_with_options("pruner_options", self.pruner, getattr(pruners, self.pruner), self.pruner_options)


@dataclass(frozen=True, kw_only=True)
class CompareSection:
    """For `surgical-peft compare`, and `source_data` for every command that trains.

    Attributes:
        methods: names from `methods`, each alone or with its arguments, e.g. `[full, head, {lora: {rank: 8}}]`.
        sources: further source models, folders or Hub ids, to repeat the comparison with.
        rate_seeds: so many of `seeds`, the first ones, choose the rates, and the others are trained at the best one
            alone; default all.
        draws: one data set for each of `seeds`, to be used instead of `data` with that seed.
        test_data: the data sets whose test splits, together, all is measured on; default is that of the training.
        source_data: data of the task that the source models were trained for, whose test split tells what they
            forget: a folder or Hub id, or keys for the data, e.g. `{data: folder, label_map: [...]}`. `train`,
            `search` and `advise` tell by it the rise of the loss there, too.
    """

    methods: list[Any] | None = None
    sources: list[str] | None = None
    rate_seeds: int | None = None
    draws: list[str] | None = None
    test_data: list[str] | None = None
    source_data: str | dict[str, Any] | None = None


def names_of(*sections: type) -> Sequence[str]:
    """The keys of some sections, in their order."""
    return [entry.name for section in sections for entry in fields(section)]
