"""The model card of a training, filled in from its `report.json` alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...atomic_files import copy_file, is_plain_file, write_text
from ...errors import SurgicalError
from ...export.card_text import TAG, AdapterInfo, describe, hub_link
from ...export.private import is_absolute, name_of, without_paths
from ...rendering import markdown_block, markdown_code, markdown_row, markdown_text
from .. import tasks
from .provenance import PACKAGES
from .report import REPORT, DataReport, RateReport, TrainingReport
from .source_data import unit_of_loss

TEMPLATE = Path(__file__).with_name("card.md.jinja")
_YAML: dict[str, Any] = {"default_flow_style": None, "width": 100}


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
    adapter = run / "adapter"
    if adapter.is_symlink():
        raise SurgicalError(f"{str(adapter)!r} is a link, which may lead anywhere: put the folder itself there.")
    card = f"{make_card(report)}\n"
    if report.plot:
        if not is_plain_file(run / report.plot):
            raise SurgicalError(f"{str(run)!r} has no {report.plot}, which its {REPORT} names: train again.")
        copy_file(run / report.plot, adapter / report.plot)
    write_text(adapter / "README.md", card)
    return run / "adapter" / "README.md"


def make_card(report: TrainingReport) -> ModelCard:
    """The model card of a report.

    Example:
        >>> make_card(TrainingReport.load("runs/auto/report.json")).data.metrics
        ['accuracy']
    """
    report = _published(report)
    model, data = _names(report)
    examples = report.dataset.examples
    return ModelCard.from_template(
        _metadata(report),
        template_path=str(TEMPLATE),
        name=markdown_text(report.name),
        model=hub_link(model) if report.base_model.on_hub else markdown_code(model),
        share=f"{report.tuned_parameters:,} of {report.all_parameters:,} parameters, "
        f"{report.tuned_parameters / report.all_parameters:.1%}",
        data_name=markdown_code(data),
        adapter=describe([_adapter(report)]),
        plot=report.plot if report.is_chosen else None,
        results=_results(report),
        forgets=_forgets(report),
        seed=report.rates.seed,
        data=_data(data, report.dataset),
        sizes=", ".join(f"{examples[split]:,} {markdown_text(split)}" for split in ("train", *report.splits)),
        shift=", ".join(markdown_code(f"{key}: {value}") for key, value in report.dataset.shift.items()),
        labels=", ".join(map(markdown_text, report.dataset.labels or ())),
        summary=[markdown_text(line) for line in report.dataset.summary or ()],
        rates=_rates(report),
        recipe=markdown_block(yaml.safe_dump(report.recipe, sort_keys=False, **_YAML).rstrip(), "yaml"),
        versions={package: markdown_text(report.versions[package]) for package in PACKAGES},
        date=markdown_text(report.date),
    )


def _published(report: TrainingReport) -> TrainingReport:
    """The report without where things lie: of an absolute path its last part."""
    summary = [line for line in report.dataset.summary or [] if not line.startswith("examples:")]
    for path in filter(is_absolute, report.recipe.values()):
        summary = [line.replace(path, name_of(path)) for line in summary]
    return replace(
        report,
        recipe=without_paths(report.recipe),
        metric=without_paths(report.metric),
        test_metrics={without_paths(metric): found for metric, found in report.test_metrics.items()},
        dataset=replace(report.dataset, summary=summary),
        rates=replace(report.rates, policy_options=without_paths(report.rates.policy_options)),
    )


def _names(report: TrainingReport) -> tuple[str, str]:
    """Model and data."""
    return str(report.recipe["model"]), str(report.recipe["data"])


def _results(report: TrainingReport) -> str:
    """The metric before and after on each split, as the rows of a table."""
    rows = [[markdown_text(report.metric), "examples", "before", "after"], ["---", "---:", "---:", "---:"]]
    for split in report.splits:
        before, after = report.before[split], report.after[split]
        rows.append([markdown_text(split), f"{report.dataset.examples[split]:,}", f"{before:.4f}", f"{after:.4f}"])
    for metric, found in report.test_metrics.items():
        name = markdown_text(f"{found.split}, {metric}")
        rows.append([name, f"{found.examples:,}", f"{found.before:.4f}", f"{found.after:.4f}"])
    if (source := report.source) is not None:
        for name, pair in (("", (source.before, source.after)), (", loss", (source.loss_before, source.loss_after))):
            cells = f"{source.examples:,}", *(f"{value:.4f}" for value in pair)
            rows.append([markdown_text(f"{source.split}{name}"), *cells])
    return "\n".join(map(markdown_row, rows))


def _forgets(report: TrainingReport) -> str:
    """What tuning costs on the source model's own data, in a sentence; empty where that was not measured."""
    if report.source is None:
        return ""
    rise = f"{report.source.rise:+.3f} {unit_of_loss(report.recipe)}"
    return f"Source: data of the task that the base model was trained for; tuning raises the loss there by {rise}."


def _rates(report: TrainingReport) -> str:
    """Learning rates and steps, as the rows of a table."""
    rates = report.rates
    rows = {
        "learning rate": rates.learning_rate,
        "policy": _policy(rates),
        "schedule": markdown_text(rates.schedule),
        "optimizer": f"{markdown_text(rates.optimizer)}, weight decay {rates.weight_decay}",
        "epochs": f"{rates.epochs} ({rates.steps:,} steps)",
        "examples in a step": rates.batch_size,
        "seed": rates.seed,
        "time, with choosing and measuring": f"{report.seconds:.0f} s",
    }
    return "\n".join(markdown_row([key, str(value)]) for key, value in rows.items())


def _metadata(report: TrainingReport) -> ModelCardData:
    model, data = _names(report)
    pipeline = report.pipeline or _shipped_pipeline(report.task)
    return ModelCardData(
        model_name=report.name,
        base_model=model if report.base_model.on_hub else None,  # the Hub refuses one that it does not have
        library_name="peft",
        pipeline_tag=pipeline,
        datasets=[data] if report.dataset.on_hub else None,
        metrics=list(dict.fromkeys([report.metric, *report.test_metrics])),
        tags=[TAG, *([report.task.replace("_", "-")] if ":" not in report.task else [])],
        eval_results=[
            EvalResult(
                task_type=pipeline or report.task,
                dataset_type=data,
                dataset_name=data,
                dataset_split=split,
                dataset_config=report.recipe.get("data_config"),
                dataset_revision=report.dataset.commit,
                metric_type=metric,
                metric_value=value,
            )
            for split, metric, value in [
                *((split, report.metric, report.after[split]) for split in report.splits),
                *((found.split, metric, found.after) for metric, found in report.test_metrics.items()),
            ]
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
        base_class=base.class_ if base.class_.isidentifier() else None,
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
        return f"{hub_link(name, 'datasets/')}, commit {markdown_code(dataset.commit)}"
    digest = markdown_code(dataset.fingerprint)
    return f"{markdown_code(name)}, which is not from the Hub; digest of its files: {digest}"


def _policy(rates: RateReport) -> str:
    if rates.policy is None:
        return "none: every block at the learning rate"
    options = ", ".join(f"{key}={value!r}" for key, value in rates.policy_options.items())
    return markdown_code(f"{rates.policy}({options})")
