"""Chats and prompts: of what the model learns, and what cannot be told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from surgical_peft import SurgicalError
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.report import TrainingReport
from surgical_peft.experiments.training.train import train
from tests.support.toy_tasks import TOY_TASKS

PLAIN = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %} {% else %}{{ m.content }} </s> {% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ m.role }} {{ m.content }} {% endif %}"
    "{% endfor %}"
)
TURNS = [("user", "meet us"), ("assistant", "at noon"), ("user", "win money"), ("assistant", "now")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return TOY_TASKS["causal_lm"](tmp_path_factory.mktemp("toy"))


def chats(toy: Recipe, folder: Path, template: str | None, rows: list[dict[str, Any]], **keys: Any) -> Recipe:
    """The toy with a chat template, and rows of data."""
    tokenizer = AutoTokenizer.from_pretrained(toy.model)
    tokenizer.chat_template = template
    load_task(toy, ("train",)).load_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return replace(toy, model=str(folder / "model"), data=str(folder / "chats.jsonl"), **keys)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_chat_only_the_answers_are_learned(toy: Recipe, tmp_path: Path, template: str) -> None:
    recipe = chats(toy, tmp_path, template, [{"messages": CHAT}] * 10)
    example = load_task(recipe, ("train",)).splits["train"][0]
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    learned = [token for token in example["labels"] if token != -100]
    assert tokenizer.decode(learned) == "at noon </s> now </s>"
    assert all(label in (-100, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))
    assert tokenizer.decode(example["input_ids"]).startswith("<unk> meet us </s>")


def test_of_a_prompt_only_the_completion_is_learned(toy: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": "meet us", "completion": "at noon", "note": "x"}] * 10
    recipe = chats(toy, tmp_path, None, rows)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    example = load_task(recipe, ("train",)).splits["train"][0]
    assert tokenizer.decode(example["input_ids"]) == "meet us at noon </s>"
    assert example["labels"] == [-100, -100, *example["input_ids"][2:]]


def test_columns_of_other_names_are_named(toy: Recipe, tmp_path: Path) -> None:
    rows = [{"question": "meet us", "answer": "at noon"}] * 10
    columns = {"prompt": "question", "completion": "answer"}
    recipe = chats(toy, tmp_path, None, rows, columns=columns)
    assert load_task(recipe, ("train",)).splits["train"][0]["labels"][:2] == [-100, -100]


def test_it_is_said_what_else_could_be_learned(toy: Recipe, tmp_path: Path) -> None:
    recipe = chats(toy, tmp_path, PLAIN, [{"text": "meet us", "messages": CHAT}] * 10)
    task = load_task(recipe, ("train",))
    assert task.splits["train"][0]["labels"] == task.splits["train"][0]["input_ids"]
    assert any("text" in line and "messages" in line for line in task.summary)
    named = load_task(replace(recipe, columns={"messages": "messages"}), ("train",))
    assert -100 in named.splits["train"][0]["labels"]
    assert not any("learned" in line for line in named.summary)
    assert not any("learned" in line for line in load_task(toy, ("train",)).summary)


def test_a_chat_is_trained_and_measured(toy: Recipe, tmp_path: Path) -> None:
    training = {"use_cpu": True, "max_steps": 2, "learning_rate": 1e-3}
    recipe = chats(
        toy, tmp_path, PLAIN, [{"messages": CHAT[:2]}, {"messages": CHAT}] * 5, blocks=["1"], training=training
    )
    recipe = replace(recipe, test_metrics={"log_likelihood": 1, "accuracy": None})  # there is no test split
    report = train(recipe, tmp_path / "run")
    assert report.dataset.examples == {"train": 8, "validation": 2}
    assert 0 <= report.after["validation"] <= 1
    accuracy, likelihood = report.test_metrics["accuracy"], report.test_metrics["log_likelihood"]
    assert (accuracy.before, accuracy.after) == (report.before["validation"], report.after["validation"])
    assert likelihood.examples == 1 and likelihood.before != likelihood.after < 0
    assert TrainingReport.load(tmp_path / "run" / "report.json") == report
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"| 1 | {likelihood.before:.4f} | {likelihood.after:.4f} |" in card and "- log_likelihood" in card


@pytest.mark.parametrize(
    ("template", "rows", "keys", "message"),
    [
        (None, [{"messages": CHAT}], {}, "no chat_template"),
        (FORGETFUL, [{"messages": CHAT}], {}, "generation"),
        ("{{ raise_exception('no system') }}", [{"messages": CHAT}], {}, "no system"),
        (PLAIN, [{"messages": CHAT}, {"messages": CHAT[:1]}], {}, "5 chats without an answer.*rows 1, 3"),
        (PLAIN, [{"messages": [{**CHAT[1], "content": [{"text": "now"}]}]}], {}, "messages of causal_lm.*as text"),
        (PLAIN, [{"messages": CHAT}], {"max_length": 3}, "no answer within 3 tokens.*max_length"),
        (None, [{"prompt": "now", "completion": ""}], {}, "completion has empty cells"),
    ],
)
def test_what_cannot_be_learned_from(
    toy: Recipe, tmp_path: Path, template: str | None, rows: list[dict[str, Any]], keys: dict[str, Any], message: str
) -> None:
    recipe = chats(toy, tmp_path, template, rows * (10 // len(rows)), **keys)
    with pytest.raises(SurgicalError, match=message):
        load_task(recipe)


def test_rows_whose_answer_is_cut_off_are_left_out_if_asked(toy: Recipe, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "now " * 20}, CHAT[1]]
    rows = [{"messages": long if row == 4 else CHAT} for row in range(20)]
    recipe = chats(toy, tmp_path, PLAIN, rows, max_length=16, drop_empty=True)
    task = load_task(recipe)
    assert sum(len(examples) for examples in task.splits.values()) == 19
    assert any("no answer within 16 tokens" in line for line in task.summary)
