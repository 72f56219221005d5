"""A comparison on prompts and completions that is measured by a further metric, and on plain texts for forgetting."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from surgical_peft import SurgicalError
from surgical_peft.experiments.compare.compare import compare
from surgical_peft.experiments.compare.comparison import Comparison, Job
from surgical_peft.experiments.compare.report import ComparisonReport
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task
from tests.support.cli import QUIET
from tests.support.toy_tasks import TOY_TASKS, WORDS

PROMPTS = [{"question": f"{word} {other}", "answer": "now"} for word in WORDS for other in WORDS[:2]]


def data_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("answers")
    toy = TOY_TASKS["causal_lm"](folder)
    return replace(
        toy,
        data=data_of(folder / "prompts", PROMPTS),
        columns={"prompt": "question", "completion": "answer"},
        metric="log_likelihood",
        test_metrics={"exact_match": 8, "accuracy": None},
        max_new_tokens=4,
        source_data={"data": toy.data, "columns": {"text": "text"}},
        methods=["nothing", "full"],
        rates=[1e-1],
        seeds=[0, 1],
        training={
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "use_cpu": True,
            "output_dir": str(folder / "run"),
        },
    )


@pytest.fixture(scope="module")
def report(recipe: Recipe) -> ComparisonReport:
    return compare(recipe, console=QUIET)


def test_further_metrics_are_of_the_test_split(recipe: Recipe, report: ComparisonReport) -> None:
    before, full = report.methods
    task = load_task(replace(recipe, metric="exact_match"), ("test",))
    eight = [task.splits["test"][index] for index in range(0, len(PROMPTS), 3)]
    assert before.test_metrics["exact_match"] == [task.measure(task.load_model(), eight)] * 2
    by_token = load_task(replace(recipe, metric="accuracy", max_new_tokens=None, test_metrics={}), ("test",))
    assert before.test_metrics["accuracy"] == [by_token.measure(by_token.load_model(), by_token.splits["test"])] * 2
    for values in full.test_metrics.values():
        assert len(values) == 2 and values != [0, 0]
    assert ComparisonReport.from_json(report.to_json()) == report


def test_what_is_forgotten_is_likelihood_of_texts(recipe: Recipe, report: ComparisonReport) -> None:
    model, losses, tokens = AutoModelForCausalLM.from_pretrained(recipe.model).requires_grad_(False), 0.0, 0
    rows = load_task(texts_of(recipe), ("test",)).splits["test"]
    for index in range(len(rows)):
        ids = torch.tensor([rows[index]["input_ids"]])
        losses += float(model(ids, labels=ids).loss) * (ids.numel() - 1)
        tokens += ids.numel() - 1
    finding = next((Path(recipe.training["output_dir"]) / "runs").glob("source-*.json"))
    assert json.loads(finding.read_text())["found"]["on_source"] == pytest.approx(-losses / tokens, rel=1e-5)
    assert report.methods[1].source_loss_rise == pytest.approx(report.methods[1].forgotten, rel=1e-4)  # the same, here
    before, full = (row.forgotten for row in report.methods)
    assert before == [0, 0] and full is not None and all(lost and lost > 0.01 for lost in full)


def texts_of(recipe: Recipe) -> Recipe:
    """The recipe of the texts that are not to be forgotten."""
    return Recipe(model=recipe.model, data=recipe.source_data["data"], task="causal_lm")  # type: ignore[index, call-overload]


def test_the_table_says_what_is_what(recipe: Recipe, report: ComparisonReport) -> None:
    text = (Path(recipe.training["output_dir"]) / "comparison" / "table.md").read_text()
    header, ruler, *rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header[-4:]] == ["exact_match, %", "accuracy, %", "forgets", "source loss"]
    assert {len(ruler), *map(len, rows)} == {len(header)}
    assert header[1].strip() == "log_likelihood" and "points" not in text
    full = report.methods[1].test_metrics["exact_match"]
    assert rows[1][-4].strip().startswith(f"{100 * sum(value or 0 for value in full) / 2:.1f} ±")
    assert "at most 8 of these examples" in text and re.search("own data, in log_likelihood", text)


def test_a_further_metric_trains_nothing_anew(recipe: Recipe) -> None:
    with_it, without = Comparison(recipe), Comparison(replace(recipe, test_metrics={"accuracy": None}))
    training = Job("training", 0, 1, "full fine-tuning", 1e-1)
    assert with_it.name_of(training) == without.name_of(training)
    assert with_it.name_of(replace(training, kind="test")) != without.name_of(replace(training, kind="test"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_metrics": {"exact_mach": None}}, "exact_mach"),
        ({"test_metrics": {"macro_f1": 3}, "max_new_tokens": None}, "macro_f1.*exact_match"),
        ({"max_new_tokens": 1}, "max_new_tokens=1 .*raise it to 2"),
        ({"test_metrics": {"exact_number": None}}, "exact_number.*never right"),
    ],
)
def test_a_further_metric_that_does_not_fit_is_told_before_training(
    changed: dict[str, Any], message: str, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(SurgicalError, match=message):
        compare(replace(recipe, **changed), tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
