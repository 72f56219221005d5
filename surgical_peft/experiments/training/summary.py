"""The report of a training as a table for the terminal, and in words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ...blocks.block_map import blocks_in_words
from ...rendering import TextTable, clock
from .questions import QUESTIONS, noise
from .report import TrainingReport
from .source_data import unit_of_loss


def table(report: TrainingReport) -> TextTable:
    """The metric before and after on each split, under what was tuned."""
    rows = [
        [split, f"{report.dataset.examples[split]:,}", *_numbers([before, report.after[split]])]
        for split, before in report.before.items()
    ]
    rows += [
        [f"{found.split}, {metric}", f"{found.examples:,}", *_numbers([found.before, found.after])]
        for metric, found in report.test_metrics.items()
    ]
    notes: list[str] = []
    if (source := report.source) is not None:
        rows.append([source.split, f"{source.examples:,}", *_numbers([source.before, source.after])])
        rows.append([f"{source.split}, loss", "", f"{source.loss_before:.4g}", f"{source.loss_after:.4g}"])
        unit = unit_of_loss(report.recipe)
        notes = [f"Source: the source model's own data; tuning raises the loss there by {source.rise:+.3f} {unit}."]
    new = ", with an untrained new head," if report.recipe.get("new_head") else ""
    return TextTable(
        f"Tuned: {tuned_in_words(report)}",
        ["split", "examples", "before", "after"],
        rows,
        [f"Before, after: {report.metric} of the model as it was{new} and as it is tuned; higher is better.", *notes],
        bold=range(len(rows)),
    )


def tuned_in_words(report: TrainingReport) -> str:
    """What was tuned: blocks, or modules by name."""
    whole = f" and {', '.join(report.modules_to_save)}" if report.modules_to_save else ""
    if report.blocks:
        return f"{blocks_in_words(report.blocks)}{whole}"
    targets = report.target_modules
    return f"modules {targets if isinstance(targets, str) else ', '.join(targets)}{whole}"


def last_lines(report: TrainingReport) -> list[str]:
    """What it cost, how sure the result is, and what question it answers."""
    share = report.tuned_parameters / report.all_parameters
    lines = [
        f"{report.tuned_parameters:,} of {report.all_parameters:,} parameters tuned ({share:.1%}), in "
        f"{clock(report.seconds)}.",
        f"Adapter, with its card in README.md: {report.adapter}",
    ]
    if report.pipeline and report.pipeline != "question-answering":  # predict reads one text at a time
        lines.append(f"To use it: surgical-peft predict {shlex.quote(str(Path(report.adapter).parent))} INPUT")
    if unlabelled := report.recipe.get("unlabelled"):
        where = "the training split" if unlabelled is True else "the streams"
        chosen = " Those of the validation split chose the epoch." * bool(report.recipe.get("early_stopping_patience"))
        lines.append(f"No label of {where} was used to train.{chosen}")
    for split in [*report.after][-1:] if report.metric == "accuracy" else ():  # a task of one's own may measure none
        lines.append(noise(report.after[split], report.dataset.examples[split], split))
    return [*lines, QUESTIONS["train"]]


def _numbers(values: Sequence[float]) -> list[str]:
    shares = all(0 <= value <= 1 for value in values)  # not a log-likelihood, say
    return [f"{value:.1%}" if shares else f"{value:.4g}" for value in values]
