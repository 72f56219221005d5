"""Question answering: tokens and places, what is read off a model, metrics, and rows that cannot be learned."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import load_dataset
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer

from surgical_peft import SurgicalError
from surgical_peft.experiments.metrics import load_metric
from surgical_peft.experiments.recipe import Recipe
from surgical_peft.experiments.start.start import guess_task
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.summary import last_lines, table
from surgical_peft.experiments.training.train import train
from tests.support.toy_tasks import TOY_TASKS

QUIET = Console(file=io.StringIO())
CONTEXT = "Ada lives in Berlin at noon"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return TOY_TASKS["question_answering"](tmp_path_factory.mktemp("questions"))


def written(toy: Recipe, folder: Path, *answers: Any, context: str = CONTEXT, **keys: Any) -> Recipe:
    """The toy with data of one question for each of the answers, the same in all splits."""
    folder.mkdir(exist_ok=True)
    rows = [{"question": "meet us", "context": context, "answers": answer} for answer in answers]
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return replace(toy, data=str(folder), **keys)


def at(text: str, start: int) -> dict[str, Any]:
    return {"text": [text], "answer_start": [start]}


class Sure(nn.Module):
    """Points with certainty to the places that an example has, or to others."""

    def __init__(self, first: list[int], last: list[int]) -> None:
        super().__init__()
        self.weight, self.places = nn.Parameter(torch.zeros(1)), (first, last)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        start, end = (
            nn.functional.one_hot(torch.tensor(places), input_ids.shape[1]).float() for places in self.places
        )
        return SimpleNamespace(start_logits=start, end_logits=end)


def test_places_are_those_of_the_tokens_of_the_answer(toy: Recipe) -> None:
    task, rows = load_task(toy), load_dataset(toy.data, split="train")
    tokenizer = AutoTokenizer.from_pretrained(toy.model)
    for example, row in zip((task.splits["train"][place] for place in range(len(rows))), rows, strict=True):
        span = example["input_ids"][example["start_positions"] : example["end_positions"] + 1]
        assert tokenizer.decode(span) == row["answers"]["text"][0]
        assert example["start_positions"] >= 1  # after the question
    batch = task.collate([task.splits["train"][place] for place in range(3)])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions"}
    assert task.load_model()(**batch).loss.isfinite()


def test_the_answer_is_read_from_the_context_as_it_is_written(toy: Recipe, tmp_path: Path) -> None:
    """Also where several are right, and where a character takes several bytes."""
    several = {"text": ["Berlin", "in Berlin"], "answer_start": [13, 10]}
    task = load_task(written(toy, tmp_path / "data", several, at("Ada", 0)))
    examples = task.splits["validation"]
    places = [(examples[row]["start_positions"], examples[row]["end_positions"]) for row in range(2)]
    assert places == [(5, 5), (2, 2)]
    assert task.measure(Sure([4, 2], [5, 2]), examples) == 1  # the second right answer of the first question
    assert task.measure(Sure([4, 2], [6, 4]), examples) == pytest.approx((0.8 + 0.5) / 2)  # of 4 words, and of 3
    exact = load_task(written(toy, tmp_path / "data", several, at("Ada", 0), metric="squad_exact_match"))
    assert exact.measure(Sure([4, 2], [6, 2]), examples) == 0.5
    umlaut = load_task(written(toy, tmp_path / "umlaut", at("Zürich", 4), context="üü: Zürich €"))
    assert umlaut.measure(Sure([3], [3]), umlaut.splits["validation"]) == 1


def test_no_answer_begins_in_the_question(toy: Recipe, tmp_path: Path) -> None:
    task = load_task(written(toy, tmp_path, at("Ada", 0)))
    assert task.measure(Sure([0], [2]), task.splits["validation"]) == 1  # "meet" is no part of the context


def test_lists_of_pairs_are_answers_as_well(toy: Recipe, tmp_path: Path) -> None:
    task = load_task(written(toy, tmp_path, [{"text": "Ada", "answer_start": 0}]))
    assert task.splits["train"][0]["start_positions"] == 2


@pytest.mark.parametrize(
    ("answer", "keys", "said"),
    [
        (at("Berlin", 12), {}, "does not stand in the context.*row 1"),
        (at("Berlin", -6), {}, "does not stand"),
        (at("", 3), {}, "does not stand"),
        ({"text": [], "answer_start": []}, {}, "question without an answer"),
        (at("noon", 23), {"max_length": 6}, "within 6 tokens.*row 1"),
    ],
)
def test_rows_that_cannot_be_learned_are_told_or_left_out(
    answer: Any, keys: Any, said: str, toy: Recipe, tmp_path: Path
) -> None:
    recipe = written(toy, tmp_path, at("Ada", 0), answer, at("in", 10), **keys)
    with pytest.raises(SurgicalError, match=said):
        load_task(recipe)
    task = load_task(replace(recipe, drop_empty=True))
    assert [len(examples) for examples in task.splits.values()] == [2, 2]
    assert any("left out by drop_empty" in line for line in task.summary)
    alone = written(toy, tmp_path / "alone", answer, drop_empty=True, **keys)
    with pytest.raises(SurgicalError):
        load_task(alone)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"metric": "span_f1"}, "squad_exact_match"),
        ({"label_map": [1, 0]}, "label_map"),
        ({"columns": {"answers": "context"}}, "answer_start"),
    ],
)
def test_what_does_not_fit_the_task(keys: Any, said: str, toy: Recipe) -> None:
    with pytest.raises(SurgicalError, match=said):
        load_task(replace(toy, **keys))


def test_it_is_trained_with_a_new_head_and_stopped_by_its_loss(toy: Recipe, tmp_path: Path) -> None:
    """Trainer finds the loss of validation data by the names of the labels, which are others here."""
    training = {"max_steps": 4, "eval_steps": 2, "save_steps": 2, "eval_strategy": "steps", "save_strategy": "steps"}
    training |= {"use_cpu": True, "output_dir": str(tmp_path), "report_to": "none"}  # type: ignore[dict-item]
    keys: dict[str, Any] = {"blocks": [0], "new_head": True, "early_stopping_patience": 1}
    report = train(replace(toy, training=training, **keys), console=QUIET)
    assert 0 <= report.after["test"] <= 1 and report.metric == "squad_f1" and report.pipeline == "question-answering"
    assert report.modules_to_save == ["qa_outputs"] and "squad_f1" in str(table(report))
    assert not any("surgical-peft predict" in line for line in last_lines(report))  # it takes one text at a time


def test_start_knows_it(toy: Recipe) -> None:
    assert guess_task(toy.model, toy.data, {}) == "question_answering"


def test_metrics_are_those_of_squad() -> None:
    """The values of the evaluation script of SQuAD v1.1, by hand."""
    f1, exact = load_metric("squad_f1"), load_metric("squad_exact_match")
    assert exact(["The U.S. Army!"], [["us army"]]) == 1 and f1(["an apple"], [["Apple pie"]]) == pytest.approx(2 / 3)
    assert f1(["red", "cat cat"], [["blue", "red car"], ["cat"]]) == pytest.approx(2 / 3)
    assert exact(["red", "a cat"], [["blue", "red"], ["dog"]]) == 0.5 and f1(["the"], [["x"]]) == 0
