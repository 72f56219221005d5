"""The model card of a training, filled in from its `report.json` alone."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...atomic_files import whole_file, write_text
from ...errors import SurgicalError
from ...export.card_text import TAG, AdapterInfo, describe
from .. import tasks
from .provenance import PACKAGES
from .report import REPORT, DataReport, RateReport, TrainingReport

TEMPLATE = Path(__file__).with_name("card.md.jinja")


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
    report = TrainingReport.load(path)
    card = f"{make_card(report)}\n"
    if report.plot:
        if not (run / report.plot).is_file():
            raise SurgicalError(f"{str(run)!r} has no {report.plot}, which its {REPORT} names: train again.")
        with whole_file(run / "adapter" / report.plot) as temporary:
            shutil.copyfile(run / report.plot, temporary)
    write_text(run / "adapter" / "README.md", card)
    return run / "adapter" / "README.md"


def make_card(report: TrainingReport) -> ModelCard:
    """The model card of a report.

    Example:
        >>> make_card(TrainingReport.load("runs/auto/report.json")).data.metrics
        ['accuracy']
    """
    model, data = _names(report)
    on_hub = report.base_model.on_hub
    rates, examples = asdict(report.rates), report.dataset.examples
    return ModelCard.from_template(
        _metadata(report),
        template_path=str(TEMPLATE),
        name=report.name,
        model=f"[{model}](https://huggingface.co/{model})" if on_hub else f"`{model}`",
        share=f"{report.tuned_parameters:,} of {report.all_parameters:,} parameters, "
        f"{report.tuned_parameters / report.all_parameters:.1%}",
        data_name=data,
        adapter=describe([_adapter(report)]),
        plot=report.plot if report.is_chosen else None,
        metric=report.metric,
        rows=[
            {"split": split, "examples": examples[split], "before": report.before[split], "after": report.after[split]}
            for split in report.splits
        ],
        data=_data(data, report.dataset),
        sizes=", ".join(f"{examples[split]:,} {split}" for split in ("train", *report.splits)),
        shift=", ".join(f"`{key}: {value}`" for key, value in report.dataset.shift.items()),
        labels=", ".join(report.dataset.labels) if report.dataset.labels else None,
        summary=[line for line in report.dataset.summary or [] if not line.startswith("examples:")],
        policy=_policy(report.rates),
        rates=rates,
        seconds=f"{report.seconds:.0f}",
        recipe=yaml.safe_dump(report.recipe, sort_keys=False, default_flow_style=None, width=100).rstrip(),
        versions={package: report.versions[package] for package in PACKAGES},
        date=report.date,
    )


def _names(report: TrainingReport) -> tuple[str, str]:
    """Model and data: a Hub id, or a path as the recipe gives it; of an absolute one the last part, for privacy."""
    given = (report.recipe["model"], report.base_model.on_hub), (report.recipe["data"], report.dataset.on_hub)
    model, data = (Path(n).name if not on_hub and Path(n).is_absolute() else n for n, on_hub in given)
    return model, data


def _metadata(report: TrainingReport) -> ModelCardData:
    model, data = _names(report)
    pipeline = report.pipeline or _shipped_pipeline(report.task)
    return ModelCardData(
        model_name=report.name,
        base_model=model if report.base_model.on_hub else None,  # the Hub refuses one that it does not have
        library_name="peft",
        pipeline_tag=pipeline,
        datasets=[data] if report.dataset.on_hub else None,
        metrics=[report.metric],
        tags=[TAG, *([report.task.replace("_", "-")] if ":" not in report.task else [])],
        eval_results=[
            EvalResult(
                task_type=pipeline or report.task,
                dataset_type=data,
                dataset_name=data,
                dataset_split=split,
                dataset_config=report.recipe.get("data_config"),
                dataset_revision=report.dataset.commit,
                metric_type=report.metric,
                metric_value=report.after[split],
            )
            for split in report.splits
        ],
    )


def _shipped_pipeline(task: str) -> str | None:
    """The Hub's name for a task, for reports that do not say it."""
    return tasks.info_of(getattr(tasks, task)).pipeline if task in tasks.__all__ else None


def _adapter(report: TrainingReport) -> AdapterInfo:
    base = report.base_model
    return AdapterInfo(
        blocks=report.blocks,
        target_modules=report.target_modules,
        modules=report.tuned_modules,
        modules_to_save=report.modules_to_save,
        lora=None,  # a recipe has none
        selection=report.selection if report.is_chosen else None,
        fingerprint=base.fingerprint,
        base=_names(report)[0],
        base_class=base.class_,
        on_hub=base.on_hub,
        commit=base.commit,
        head=_head(base.new_labels, report.dataset.labels),
        pipeline=report.pipeline or _shipped_pipeline(report.task),
        in_pipeline=report.in_pipeline,
    )


def _head(count: int | None, names: list[str] | None) -> dict[str, Any] | None:
    """The arguments that make a new head, for `from_pretrained`."""
    if count is None:
        return None
    return {"num_labels": count, **({"id2label": dict(enumerate(names))} if names else {})}


def _data(name: str, dataset: DataReport) -> str:
    if dataset.on_hub:
        return f"[{name}](https://huggingface.co/datasets/{name}), commit `{dataset.commit}`"
    return f"`{name}`, which is not from the Hub; digest of its files: `{dataset.fingerprint}`"


def _policy(rates: RateReport) -> str:
    if rates.policy is None:
        return "none: every block at the learning rate"
    return f"`{rates.policy}({', '.join(f'{key}={value!r}' for key, value in rates.policy_options.items())})`"
