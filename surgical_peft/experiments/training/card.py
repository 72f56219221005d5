"""The model card of a training, filled in from its `report.json` alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...atomic_files import whole_file, write_text
from ...auto import MOST
from ...errors import SurgicalError
from ...export.adapter_card import TAG, AdapterInfo, describe

TEMPLATE = Path(__file__).with_name("card.md.jinja")
REPORT = "report.json"
PACKAGES = ("surgical-peft", "torch", "transformers", "peft", "datasets")
RANDOM_SHIFTS = ("corruption", "character_noise", "casing", "imbalance")
RATES = ("learning_rate", "weight_decay", "epochs", "steps", "batch_size", "seed")

# What the Hub calls the tasks; where it has no name for one, the card goes without.
PIPELINES = {
    "image_classification": "image-classification",
    "text_classification": "text-classification",
    "token_classification": "token-classification",
    "causal_lm": "text-generation",
}


def write_card(run: str | Path) -> Path:
    """Write the model card of a training beside its adapter, with the plot of the scores; whole or not at all.

    Args:
        run: the folder that `surgical-peft train` wrote.

    Returns:
        The card's path: `adapter/README.md` in that folder.

    Raises:
        SurgicalError: no report or adapter there, or a report without something that the card has to say.

    Example:
        >>> write_card("runs/auto")
        PosixPath('runs/auto/adapter/README.md')
    """
    run = Path(run)
    path = run / REPORT
    if not path.is_file() or not (run / "adapter" / "adapter_config.json").is_file():
        missing = "adapter" if path.is_file() else REPORT
        raise SurgicalError(f"{str(run)!r} has no {missing}: give the folder that `surgical-peft train` wrote.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SurgicalError(f"{str(path)!r} is not readable as JSON ({error}): train again.") from error
    card = f"{make_card(report)}\n"
    if plot := report["plot"]:
        if not (run / plot).is_file():
            raise SurgicalError(f"{str(run)!r} has no {plot}, which its {REPORT} names: train again.")
        with whole_file(run / "adapter" / plot) as temporary:
            shutil.copyfile(run / plot, temporary)
    write_text(run / "adapter" / "README.md", card)
    return run / "adapter" / "README.md"


def make_card(report: Mapping[str, Any]) -> ModelCard:
    """The model card of a report.

    Raises:
        SurgicalError: something that the card has to say is missing, or is no number where it should be one.

    Example:
        >>> make_card(report).data.metrics
        ['accuracy']
    """
    said = _Said(report)
    base, dataset, rates, versions = (said.part(key) for key in ("base_model", "dataset", "rates", "versions"))
    name, task, metric = (said.text(key) for key in ("name", "task", "metric"))
    recipe, labels = said.part("recipe"), dataset.maybe(dataset.names, "labels")
    selection = _selection(said, recipe)
    on_hub, data_on_hub = base.flag("on_hub"), dataset.flag("on_hub")
    model, data = _name(recipe.text("model"), on_hub), _name(recipe.text("data"), data_on_hub)
    tuned, total = said.number("tuned_parameters"), said.number("all_parameters")
    before, after, examples = said.part("before"), said.part("after"), dataset.part("examples")
    splits = [key for key in {**before.values, **after.values, **examples.values} if key != "train"]
    rows = [
        {"split": key, "examples": examples.number(key), "before": before.number(key), "after": after.number(key)}
        for key in splits
    ]
    adapter = AdapterInfo(
        blocks=said.maybe(said.names, "blocks"),
        target_modules=said.value("target_modules"),
        modules=said.names("tuned_modules"),
        modules_to_save=said.maybe(said.names, "modules_to_save"),
        lora=None,  # a recipe has none
        selection=selection,
        fingerprint=base.maybe(base.text, "fingerprint"),
        base=model,
        base_class=base.text("class"),
        on_hub=on_hub,
        commit=base.maybe(base.text, "commit"),
        new_labels=base.maybe(base.number, "new_labels"),
    )
    return ModelCard.from_template(
        ModelCardData(
            model_name=name,
            base_model=model if on_hub else None,  # the Hub refuses one that it does not have, such as a folder
            library_name="peft",
            pipeline_tag=PIPELINES.get(task),
            datasets=[data] if data_on_hub else None,
            metrics=[metric],
            tags=[TAG, *([task.replace("_", "-")] if ":" not in task else [])],
            eval_results=[
                EvalResult(
                    task_type=PIPELINES.get(task, task),
                    dataset_type=data,
                    dataset_name=data,
                    dataset_split=row["split"],
                    dataset_revision=dataset.value("commit"),
                    metric_type=metric,
                    metric_value=row["after"],
                )
                for row in rows
            ],
        ),
        template_path=str(TEMPLATE),
        name=name,
        model=f"[{model}](https://huggingface.co/{model})" if on_hub else f"`{model}`",
        share=f"{tuned:,} of {total:,} parameters, {tuned / total:.1%}",
        data_name=data,
        adapter=describe([adapter]),
        plot=said.text("plot") if selection else None,
        metric=metric,
        rows=rows,
        data=_data(data, dataset),
        sizes=", ".join(f"{examples.number(split):,} {split}" for split in ("train", *splits)),
        shift=", ".join(f"`{key}: {value}`" for key, value in _shift(dataset, recipe).items()),
        labels=", ".join(labels) if labels else None,
        policy=_policy(rates, recipe),
        rates={key: rates.number(key) for key in RATES} | {key: rates.text(key) for key in ("schedule", "optimizer")},
        seconds=f"{said.number('seconds'):.0f}",
        recipe=yaml.safe_dump(recipe.values, sort_keys=False, default_flow_style=None, width=100).rstrip(),
        versions={package: versions.text(package) for package in PACKAGES},
        date=said.text("date"),
    )


def _name(given: str, on_hub: bool) -> str:
    """A Hub id, or a path as the recipe gives it; of an absolute one the last part, the rest is nobody's business."""
    return Path(given).name if not on_hub and Path(given).is_absolute() else given


def _selection(said: _Said, recipe: _Said) -> dict[str, Any] | None:
    """The record of how the blocks were chosen, with all its numbers; None if the recipe names them."""
    if recipe.values.get("blocks", "auto") != "auto":
        return None
    record = said.part("selection")
    for key in ("rule", "criterion"):
        record.text(key)
    for key in ("k", "num_batches", "seed"):
        record.number(key)
    if is_limited := "cost" in record.values:
        cost = record.part("cost")
        cost.number("budget")
        cost.number("steps")
    scores = record.part("scores")
    values = {block: scores.number(block) for block in said.names("scored")}
    # Without a number, the best were tried together, one more than was worth it, or as many as there was budget for.
    is_open = recipe.values.get("num_blocks") is None
    if is_open and (not is_limited or "joint_loss" in record.values):
        loss, refused = record.part("joint_loss"), record.values.get("refused", {})
        tried = [] if is_limited else sorted(values.keys() - refused, key=lambda block: -values[block])
        tried = tried[: min(int(record.number("k")) + 1, MOST)]
        missing = [block for block in tried if block not in loss.values]
        # Of blocks with equal scores any may have been the last that was tried.
        wanted = missing[len(loss.values.keys() - set(tried)) :] if missing else []
        for block in (*wanted, *loss.values):
            loss.number(block)
    return dict(record.values)


def _shift(dataset: _Said, recipe: _Said) -> dict[str, Any]:
    """What the recipe changes on purpose, as the data set has it."""
    shift = dataset.mapping("shift")
    for key in (*RANDOM_SHIFTS, "label_map"):
        if recipe.values.get(key):
            shift.same(key, recipe.values[key])
    if "corruption" in shift.values:
        shift.number("severity")
    if shift.values.keys() & set(RANDOM_SHIFTS):
        shift.number("shift_seed")
    return dict(shift.values)


def _data(name: str, dataset: _Said) -> str:
    if dataset.flag("on_hub"):
        return f"[{name}](https://huggingface.co/datasets/{name}), commit `{dataset.text('commit')}`"
    return f"`{name}`, which is not from the Hub; digest of its files: `{dataset.text('fingerprint')}`"


def _policy(rates: _Said, recipe: _Said) -> str:
    rates.same("policy", recipe.values.get("policy"))
    if rates.value("policy") is None:
        return "none: every block at the learning rate"
    rates.same("policy_options", recipe.values.get("policy_options", {}))
    options = ", ".join(f"{key}={value!r}" for key, value in rates.mapping("policy_options").values.items())
    return f"`{rates.text('policy')}({options})`"


@dataclass(frozen=True)
class _Said:
    """A report, or a part of it, that is asked for what has to be there.

    Attributes:
        values: the part.
        where: the keys that lead to it.
    """

    values: Mapping[str, Any]
    where: str = ""

    def value(self, key: str) -> Any:
        if key not in self.values:
            raise SurgicalError(f"{REPORT} has no {self.where}{key}, which the card has to say: train again.")
        return self.values[key]

    def part(self, key: str) -> _Said:
        return _Said(self._of(key, dict, "keys"), f"{self.where}{key}.")

    def mapping(self, key: str) -> _Said:
        """A part that may be empty."""
        return _Said({}, f"{self.where}{key}.") if self.value(key) == {} else self.part(key)

    def maybe(self, read: Callable[[str], Any], key: str) -> Any:
        return None if self.value(key) is None else read(key)

    def same(self, key: str, there: Any) -> None:
        if self.value(key) != there:
            raise SurgicalError(
                f"{self.where}{key} is {self.values[key]!r} in {REPORT}, and {there!r} in its recipe: train again."
            )

    def text(self, key: str) -> str:
        return self._of(key, str, "text")

    def flag(self, key: str) -> bool:
        return self._of(key, bool, "true or false")

    def names(self, key: str) -> list[str]:
        found = self._of(key, list, "names")
        if not all(isinstance(each, str) for each in found):
            raise SurgicalError(
                f"{self.where}{key} is {found!r} in {REPORT}, and all of it must be names: train again."
            )
        return found

    def number(self, key: str) -> Any:
        value = self._of(key, int | float, "a number")
        if isinstance(value, bool) or not math.isfinite(value):
            raise SurgicalError(
                f"{self.where}{key} is {value} in {REPORT}: that is no result to publish, train again."
            )
        return value

    def _of(self, key: str, kind: Any, wanted: str) -> Any:
        value = self.value(key)
        if not isinstance(value, kind) or value in ("", {}, []):
            raise SurgicalError(
                f"{self.where}{key} is {value!r} in {REPORT}, and the card needs {wanted} there: train again."
            )
        return value
