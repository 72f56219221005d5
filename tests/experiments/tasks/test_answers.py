"""Answers that a language model writes by itself, against a loop that writes one token of one answer at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.tasks.answers import split_answer
from surgical_peft.experiments.tasks.tiny_data import TEXT_CONFIG, save_tokenizer
from surgical_peft.experiments.training.fit import fit

LIMIT = 9
PROMPTS = ["2+3?", "1+1?", "how many are 4 and 3?", "4+4?", "5+2, then 1 more?", "3?"]
ROWS = [{"prompt": prompt, "completion": f"it is {number}"} for number, prompt in enumerate(PROMPTS, 2)]
TURNS = [("user", "2+3?"), ("assistant", "5"), ("user", "and 2?"), ("assistant", "is 7")]
CHAT = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Problems, and a model of characters that has half learned them; its own config says to write otherwise."""
    folder = tmp_path_factory.mktemp("problems")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **TEXT_CONFIG, max_position_embeddings=64))
    model.save_pretrained(folder)
    save_tokenizer(model.config, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    made = Recipe(model=str(folder), data=data_of(folder, ROWS), task="causal_lm", max_new_tokens=LIMIT)
    task = load_task(replace(made, max_new_tokens=None), ("train",))
    steps = {"max_steps": 40, "learning_rate": 0.02, "use_cpu": True}
    fit(model, replace(made, training=steps).arguments(), task.splits["train"], collate=task.collate)
    model.generation_config = GenerationConfig(eos_token_id=1, do_sample=True, temperature=3.0, repetition_penalty=9.0)
    model.save_pretrained(folder)
    return replace(made, metric="exact_number")


def data_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def written_alone(model: Any, prompt: list[int], ends: int) -> list[int]:
    """The likeliest token again and again, without cache or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + LIMIT and (len(ids) == len(prompt) or ids[-1] != ends):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_batch_writes_what_each_prompt_alone_would(recipe: Recipe, side: str) -> None:
    task = load_task(recipe, ("test",))
    task.processor.padding_side = side
    model = get_surgical_model(task.load_model(), SurgicalConfig(blocks=[0])).train()
    examples = [task.splits["test"][index] for index in range(len(ROWS))]
    state = torch.get_rng_state()
    measured = task.measure(model, examples)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    predicted, wanted = task.measure.read(model.eval(), task.collate(examples))  # type: ignore[attr-defined]
    prompts = [task.processor(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    alone = [task.processor.decode(written_alone(model, ids, 1), skip_special_tokens=True) for ids in prompts]
    assert predicted == [text.strip() for text in alone] and wanted == [row["completion"] for row in ROWS]
    assert len(set(predicted)) > 1 and 0 < measured < 1  # else it could hardly fail
    hits = [text[-1:] == row["completion"][-1] for text, row in zip(predicted, ROWS, strict=True)]
    assert measured == sum(hits) / len(hits)


def test_of_a_chat_the_last_answer_is_written(recipe: Recipe, tmp_path: Path) -> None:
    task = load_task(replace(recipe, data=data_of(tmp_path, [CHAT] * 2)), ("test",))
    example = task.splits["test"][0]
    prompt, answer = split_answer(example["input_ids"], example["labels"])
    assert (task.processor.decode(prompt), task.processor.decode(answer)) == ("u:2+3?;a:5;u:and 2?;a:", "is 7;")


def test_max_length_is_for_training_alone(recipe: Recipe) -> None:
    short = replace(recipe, max_length=8, drop_empty=True)
    task = load_task(short, ("train", "test"))
    assert max(len(task.splits["train"][index]["input_ids"]) for index in range(len(task.splits["train"]))) == 8
    assert task.splits["test"][0] == load_task(recipe, ("test",)).splits["test"][0]
    by_token = load_task(replace(short, metric="log_likelihood", max_new_tokens=None), ("test",))
    assert len(by_token.splits["test"][0]["input_ids"]) == 8


@pytest.mark.parametrize(
    ("rows", "changed", "message"),
    [
        ([{"text": "2+3 is 5"}], {}, "prompt and completion"),
        ([*ROWS, {"prompt": "4?", "completion": "it is four"}], {}, r"1 of 7.*example 6"),
        ([*ROWS, {"prompt": "4?", "completion": "it is 1234567890"}], {}, r"max_new_tokens=9 .*raise it to 17"),
        ([*ROWS, {"prompt": "4?" * 40, "completion": "8"}], {}, "64 tokens"),
        (ROWS, {"metric": "accuracy"}, "max_new_tokens=9.*exact_number"),
        (ROWS, {"metric": "span_f1"}, "exact_number"),
    ],
)
def test_what_cannot_be_written_is_told_before_training(
    recipe: Recipe, rows: list[dict[str, Any]], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_task(replace(recipe, data=data_of(tmp_path, rows), **changed), ("test",))
