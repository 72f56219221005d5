"""`--tiny`: the model and the data that it makes, what it refuses, and that it replaces no real result."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import metadata_load
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from surgical_peft import SurgicalError
from surgical_peft.cli.main import main
from surgical_peft.experiments.recipe import Recipe, load_recipe
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.tiny import BATCHES, MEASURED, NOTICE, make_tiny
from surgical_peft.experiments.training.train import train

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "image_classification": {"model_type": "vit", "image_size": 16, "patch_size": 8, **SMALL},
    "text_classification": {"model_type": "bert", "max_position_embeddings": 64, **SMALL},
    "token_classification": {"model_type": "bert", "max_position_embeddings": 64, **SMALL},
    "causal_lm": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "seq2seq": {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "question_answering": {"model_type": "bert", "max_position_embeddings": 64, **SMALL},
}
COLUMNS = {
    "image_classification": {"image": "photo", "label": "kind"},
    "text_classification": {"text": "body", "label": "kind"},
    "token_classification": {"tokens": "words", "tags": "ner_tags"},
    "causal_lm": {"text": "body"},
    "seq2seq": {"text": "dialogue", "target": "summary"},
    "question_answering": {"question": "asked", "context": "passage", "answers": "said"},
}


def recipe_for(task: str, **keys: Any) -> Recipe:
    """A recipe whose model and data nobody has."""
    keys = {"columns": COLUMNS[task], "tiny": MODELS[task], "training": {"per_device_train_batch_size": 4}} | keys
    return Recipe(model="nobody/model", data="nobody/data", task=task, **keys)


def rows(recipe: Recipe, split: str = "train") -> Any:
    return load_dataset("parquet", data_files=f"{recipe.data}/{split}.parquet", split="train")


@pytest.mark.parametrize("task", ["image_classification", "text_classification"])
@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_the_target_is_that_of_the_recipe(tmp_path: Path, task: str, new_head: bool, problem_type: str) -> None:
    loaded = load_task(make_tiny(recipe_for(task, problem_type=problem_type, new_head=new_head), tmp_path))
    batch = loaded.collate([loaded.splits["train"][index] for index in range(4)])
    assert batch["labels"].is_floating_point()
    assert loaded.load_model()(**batch).loss.isfinite()


@pytest.mark.parametrize("task", MODELS)
def test_model_and_data_are_what_the_recipe_asks_for(tmp_path: Path, task: str) -> None:
    recipe = recipe_for(task)
    tiny = make_tiny(recipe, tmp_path)
    assert set(rows(tiny).column_names) == set(COLUMNS[task].values())
    loaded = load_task(tiny)
    assert {split: len(each) for split, each in loaded.splits.items()} == {
        "train": BATCHES * 4,
        "validation": MEASURED,
        "test": MEASURED,
    }
    model = loaded.load_model()
    assert model.config.model_type == MODELS[task]["model_type"]
    assert all(getattr(model.config, key) == value for key, value in MODELS[task].items())
    loss = model(**loaded.collate([loaded.splits["train"][index] for index in range(4)])).loss
    assert loss.isfinite()
    same = {"model": "", "data": "", "training": {}}
    assert replace(tiny, **same) == replace(recipe, **same)
    assert tiny.training["max_steps"] == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"columns": {"messages": "conversations"}},
        {"columns": {"prompt": "question", "completion": "answer"}},
        {"columns": {}, "test_metrics": {"exact_match": 2}},  # the data's own names may be these
    ],
)
def test_chats_and_prompts_are_made_as_the_recipe_reads_them(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Texts were made for all of them, and the columns that the recipe names were not there."""
    tiny = make_tiny(recipe_for("causal_lm", **keys), tmp_path)
    task = load_task(replace(tiny, metric="exact_match", max_new_tokens=8))
    example = task.splits["train"][0]
    answered = [token for token in example["labels"] if token != -100]
    assert 3 < len(answered) < len(example["labels"]) and answered[-1] == 1  # a word, and the end of a text
    assert 0 <= task.measure(task.load_model(), [task.splits["test"][place] for place in range(2)]) <= 1


def test_it_goes_on_until_the_last_stage(tmp_path: Path) -> None:
    plan = [{"blocks": "head", "steps": 3}, {}]
    for number, (keys, steps) in enumerate(
        [
            ({"policy": "lp_ft", "policy_options": {"epochs": 2}}, 2 * BATCHES + 1),
            ({"policy": "stages", "policy_options": {"plan": plan}}, 4),
        ]
    ):
        tiny = make_tiny(recipe_for("text_classification", **keys), tmp_path / str(number))
        assert tiny.training["max_steps"] == steps


def test_the_same_every_time(tmp_path: Path) -> None:
    first, second = (make_tiny(recipe_for("text_classification"), tmp_path / name) for name in ("a", "b"))
    assert rows(first).to_list() == rows(second).to_list()
    assert rows(first).to_list() != rows(first, "test").to_list()
    weights = [Path(each.model, "model.safetensors").read_bytes() for each in (first, second)]
    assert weights[0] == weights[1]


def test_the_data_can_be_learned(tmp_path: Path) -> None:
    """By rules that know how they are made."""
    images = rows(make_tiny(recipe_for("image_classification"), tmp_path / "image"))
    brightness = np.array([np.asarray(image).mean() for image in images["photo"]])
    middles = [brightness[np.array(images["kind"]) == label].mean() for label in range(3)]
    assert [int(np.argmin(abs(each - np.array(middles)))) for each in brightness] == list(images["kind"])
    texts = rows(make_tiny(recipe_for("text_classification"), tmp_path / "text"))
    names = texts.features["kind"].names
    assert all(names[row["kind"]] in row["body"] for row in texts)
    tagged = rows(make_tiny(recipe_for("token_classification"), tmp_path / "tokens"))
    tags = tagged.features["ner_tags"].feature.names
    told = {(word, tags[tag]) for row in tagged for word, tag in zip(row["words"], row["ner_tags"], strict=True)}
    assert len({word for word, _ in told}) == len(told) and {"B-PER", "I-PER", "O"} <= {tag for _, tag in told}
    pairs = rows(make_tiny(recipe_for("seq2seq"), tmp_path / "pairs"))
    assert all(row["dialogue"].split()[0] == row["summary"] for row in pairs)


def test_the_tokenizer_reads_everything_and_writes_it_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(recipe_for("causal_lm"), tmp_path).model)
    text = "One, two: 3!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) + 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("keys", "labels", "classes"),
    [
        ({"label_map": [1, 0]}, {0, 1}, 2),
        ({"label_map": {"coat": 0, "boot": 1}}, {0, 1}, 3),  # the class that it leaves out is there too
        ({"label_map": {0: 1, 4: 0}}, {0, 1}, 5),
        ({"label_map": {"coat": 0, "boot": 7}}, {0, 7}, 3),
        ({"imbalance": {"coat": 0.5}}, {0, 1, 2}, 3),
        ({"label_map": [0, 0, 1, 1], "imbalance": {"coat": 0.5}, "new_head": True}, {0, 1}, 4),
    ],
)
def test_classes_fit_the_shift(tmp_path: Path, keys: dict[str, Any], labels: set[int], classes: int) -> None:
    tiny = make_tiny(recipe_for("text_classification", **keys), tmp_path)
    examples = load_task(tiny, ("train",)).splits["train"]
    assert {examples[index]["labels"] for index in range(len(examples))} == labels
    assert len(rows(tiny).features["kind"].names) == classes


def test_a_text_is_cut_to_what_the_tiny_model_takes(tmp_path: Path) -> None:
    assert make_tiny(recipe_for("text_classification", max_length=512), tmp_path).max_length == 64
    assert make_tiny(recipe_for("text_classification", max_length=5), tmp_path).max_length == 5
    assert make_tiny(recipe_for("seq2seq", max_length=512), tmp_path).max_length == 512  # T5 takes any


BERT = MODELS["text_classification"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tiny": {}}, r"tiny: \{model_type"),
        ({"tiny": {"hidden_size": 8}}, "model_type None"),
        ({"tiny": {**BERT, "model_type": "bret"}}, "model_type 'bret'"),
        ({"tiny": {**BERT, "hiden_size": 8}}, "bert.*'hiden_size'.*'hidden_size'"),
        ({"tiny": {**BERT, "vocab_size": 9}}, "vocab_size"),
        ({"tiny": {**BERT, "hidden_size": "big"}}, "(?s)transformers does not take it: .*expected int, got str"),
        ({"tiny": {**BERT, "num_attention_heads": 3}}, "text_classification.*hidden"),
        ({"tiny": MODELS["image_classification"]}, "text_classification.*Unrecognized"),
        ({"task": "mine:own"}, "'mine:own'"),
        ({"task": "tests.support.own_tasks:plain"}, "own_tasks:plain"),
    ],
)
def test_what_it_refuses_before_writing(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        make_tiny(replace(recipe_for("text_classification"), **keys), tmp_path)
    assert not list((tmp_path / "tiny").rglob("*.*"))


def test_a_task_of_the_users_own_says_all_about_itself_in_its_file(tmp_path: Path) -> None:
    """The keys that it reads, the Hub's name for it, and a tiny model with data."""
    recipe = replace(recipe_for("text_classification"), task="tests.support.own_tasks:own", blocks=["head"])
    report = train(make_tiny(recipe, tmp_path), tmp_path / "run")
    assert report.pipeline == "text-classification" and report.dataset.labels
    assert metadata_load(tmp_path / "run" / "adapter" / "README.md")["pipeline_tag"] == "text-classification"
    with pytest.raises(SurgicalError, match=r"casing.*label_map"):
        load_task(replace(recipe, casing=3.0))


def test_a_config_that_fails_without_a_message_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(SurgicalError, match="AssertionError"):
        make_tiny(recipe_for("causal_lm"), tmp_path)


def test_what_is_not_ours_is_kept(tmp_path: Path) -> None:
    own = tmp_path / "tiny" / "tiny-generated-data" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(SurgicalError, match="earlier result"):
        make_tiny(recipe_for("seq2seq"), tmp_path)
    assert own.read_text() == "mine" and not (tmp_path / "tiny" / "tiny-random-model").exists()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["surgical-peft", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A recipe, and where its results go something that looks like them."""
    task, folder = "token_classification", tmp_path / "run"
    keys: dict[str, Any] = {"model": "nobody/model", "data": "nobody/data", "task": task, "tiny": MODELS[task]}
    keys |= {"columns": COLUMNS[task], "blocks": [0], "per_device_train_batch_size": 4, "use_cpu": True}
    keys |= {"learning_rate": 1e-2, "output_dir": str(folder)}
    (folder / "adapter").mkdir(parents=True)
    for name in ("report.json", "adapter/adapter_config.json"):
        (folder / name).write_text("real")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def test_train_tiny(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = file.parent / "run"
    for _ in range(2):  # again, over its own results
        assert run(monkeypatch, "train", str(file), "--tiny", "--json") == 0
        said = capsys.readouterr()
        assert " ".join(said.err.split()).count(NOTICE) == 1
        report = json.loads(said.out)
    assert (report["blocks"], report["rates"]["steps"]) == (["0"], 2)
    assert report == json.loads((folder / "tiny" / "report.json").read_text())
    assert (folder / "report.json").read_text() == (folder / "adapter" / "adapter_config.json").read_text() == "real"
    base = AutoModelForTokenClassification.from_pretrained(folder / "tiny" / "tiny-random-model")
    PeftModel.from_pretrained(base, folder / "tiny" / "adapter")
    card = (folder / "tiny" / "adapter" / "README.md").read_text()
    assert "`tiny-random-model`" in card and "`tiny-generated-data`" in card
    assert run(monkeypatch, "train", str(file)) == 2  # the real one, without the Hub
    assert "the model 'nobody/model' cannot be loaded" in capsys.readouterr().err


def test_compare_tiny(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As `search`, by the same way; and what a comparison draws on besides is left out."""
    keys = {**yaml.safe_load(file.read_text()), "blocks": "auto", "rates": [1e-2], "seeds": [0], "methods": ["full"]}
    keys |= {"sources": ["nobody/other"], "draws": ["nobody/draw"], "source_data": "nobody/source"}
    file.write_text(yaml.safe_dump(keys))
    assert run(monkeypatch, "compare", str(file), "--tiny", "--json") == 0
    said = capsys.readouterr()
    (row,) = json.loads(said.out)["methods"]
    assert NOTICE in " ".join(said.err.split()) and len(row["source_loss_rise"]) == 1
    assert (file.parent / "run" / "tiny" / "comparison" / "report.json").is_file()
    assert not (file.parent / "run" / "comparison").exists()


def test_tiny_is_no_setting_of_the_real_training(file: Path) -> None:
    """So a study or comparison that has begun goes on when such a model is written into its recipe."""
    recipe = load_recipe(file)
    assert recipe.tiny == recipe.keys()["tiny"] == MODELS["token_classification"]
    assert recipe.settings() == replace(recipe, tiny={}).settings()
