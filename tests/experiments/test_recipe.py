from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset_builder
from transformers import AutoConfig

from surgical_peft import SurgicalError, criteria, policies
from surgical_peft.experiments.compare.methods import make_method
from surgical_peft.experiments.recipe import Recipe, load, load_recipe, recipe_of
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.tasks.task import load_or_raise

MINIMAL = "model: m\ndata: d\nblocks: [0]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_made_of_the_keys_that_it_gives(tmp_path: Path) -> None:
    """As a report holds them; `Recipe(**keys)` knows no training arguments."""
    recipe = load_recipe(write(tmp_path, MINIMAL + "learning_rate: 1e-3\nsplits: {validation: test}\n"))
    assert recipe_of(recipe.keys()) == recipe
    with pytest.raises(SurgicalError, match="learning_rat'"):
        recipe_of({**recipe.keys(), "learning_rat": 1e-3})


def test_own_keys_and_training_arguments_share_one_flat_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL + "learning_rate: 1e-3\nnum_train_epochs: 2\nseed: 5\n"))
    assert recipe.blocks == [0]
    assert recipe.config().blocks == [0]
    args = recipe.arguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.num_train_epochs, args.seed) == (1e-3, 2, 5)
    assert args.report_to == [] and args.save_strategy == "no"


def test_folders_are_looked_up_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.model == str(tmp_path / "m")
    assert recipe.data == "d"  # no such folder: a Hub id


def test_what_begins_with_a_dot_is_beside_the_recipe_or_nowhere(tmp_path: Path) -> None:
    """The mail recipes without `make mail` said `Repo id must be in the form 'repo_name'`."""
    (tmp_path / "recipes").mkdir()
    recipe = load_recipe(write(tmp_path / "recipes", "model: ../data/model\ndata: ./data\nblocks: [0]\n"))
    assert recipe.model == str(tmp_path / "data" / "model")
    assert recipe.keys() == {"model": "../data/model", "data": "./data", "blocks": [0]}
    for read, what in ((AutoConfig.from_pretrained, "model"), (load_dataset_builder, "data")):
        path = getattr(recipe, what)
        with pytest.raises(SurgicalError, match=f"the {what} '{path}' cannot be loaded: there is no folder {path}\\."):
            load_or_raise(read, path, what)


@pytest.mark.parametrize("before", ["# Mails. ", "# Mails.\n#\n#   surgical-peft train\n#\n# "])
def test_of_a_folder_that_is_missing_the_header_says_what_makes_it(before: str, tmp_path: Path) -> None:
    header = f"{before}Needs `make\n# mail` once; on the Hub org/mails.\n#\n#   surgical-peft train\n# Expected: 5.\n"
    recipe = load_recipe(write(tmp_path, f"{header}model: ./model\ndata: ./data\nblocks: [0]\n"))
    with pytest.raises(SurgicalError, match=r"no folder .*: Needs `make mail` once; on the Hub org/mails\.$"):
        load_task(recipe)


def test_a_metrics_folder_is_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("mine", "accuracy"):
        (tmp_path / name).mkdir()
    for written, read in (
        ("mine", f"{tmp_path}/mine"),
        ("mine:last", f"{tmp_path}/mine:last"),
        ("./none", f"{tmp_path}/none"),
        ("accuracy", "accuracy"),
        ("of/the-hub:first", "of/the-hub:first"),
    ):
        recipe = load_recipe(write(tmp_path, MINIMAL + f"metric: {written}\n"))
        assert recipe.metric == read and recipe.keys()["metric"] == written


def test_the_result_of_a_search_is_beside_the_recipe(tmp_path: Path) -> None:
    text = MINIMAL + "methods: [full, {searched: {result: run/search.json}}, {searched: {procedure: sweep}}]\n"
    recipe = load_recipe(write(tmp_path, text))
    path = str(tmp_path / "run" / "search.json")
    assert recipe.methods == ["full", {"searched": {"result": path}}, {"searched": {"procedure": "sweep"}}]
    assert recipe.keys()["methods"][1] == {"searched": {"result": "run/search.json"}}
    with pytest.raises(SurgicalError, match=f"searched.*'{path}'"):
        make_method(recipe.methods[1])


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    """PyYAML reads 1e-3 as a string, which TrainingArguments takes and fails on much later."""
    assert load_recipe(write(tmp_path, MINIMAL + "learning_rate: 3e-4\n")).training["learning_rate"] == 3e-4


def test_a_policy_with_its_options(tmp_path: Path) -> None:
    text = MINIMAL + "policy: layer_decay\npolicy_options: {decay: 0.5}\n"
    assert load_recipe(write(tmp_path, text)).make_policy() == policies.layer_decay(0.5)
    assert load_recipe(write(tmp_path, MINIMAL)).make_policy() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "lerning_rate: 1e-3\n", "'lerning_rate'.*'learning_rate'"),
        (MINIMAL + "block: [1]\n", "'block'.*'blocks'"),
        (MINIMAL + "blocks: [1]\n", "'blocks'.*twice"),
        (MINIMAL + "learning_rate: fast\n", "learning_rate is 'fast'.*number"),
        (MINIMAL + "seed: true\n", "seed is True.*whole"),
        (MINIMAL + "policy_options: {decay: 1, decay: 2}\n", "'decay'.*twice"),
        ("model: m\n", "data.*missing"),
        ("model: 3\ndata: d\n", "model is 3 .*text"),
        (MINIMAL + "optim: adamw\n", "TrainingArguments"),
        (MINIMAL + "lr_scheduler_type: cosin\n", "TrainingArguments"),
        (MINIMAL + "num_batches: many\n", "num_batches is 'many'.*number"),
        (MINIMAL + "frozen_eval: nope\n", "frozen_eval is 'nope'.*true"),
        ("model: m\ndata: d\nblocks: auto\nnum_blocks: two\n", "num_blocks is 'two'"),
        (MINIMAL + "policy: layer_decai\n", "'layer_decay'"),
        (MINIMAL + "policy: static\npolicy_options: {multipliers: {0: x}}\n", "static"),
        (
            MINIMAL + "policy: lp_ft\npolicy_options: {epochs: 9}\nnum_train_epochs: 3\n",
            "9 epochs.*3",
        ),
        (MINIMAL + "policy: stages\npolicy_options: {plan: [{steps: 5}, {}]}\nmax_steps: 5\n", "begins after 5 steps"),
        (MINIMAL + "resume_from_checkpoint: x\n", "resume_from_checkpoint"),
        (MINIMAL + "? [a]\n: 1\n", "cannot be a key"),
        ("", "holds no keys"),
        ("- a\n- b\n", "holds no keys"),
        ("model: [\n", "is not YAML"),
        ("model: m\ndata: d\nblocks: []\n", "selects nothing"),
        ("model: m\ndata: d\nblocks: [0]\nnum_blocks: 2\n", "blocks='auto'"),
        ("model: m\ndata: d\ncriterion: rnn\ncriterion_options: {a: 1}\n", "'rgn'"),
        ("model: m\ndata: d\ncriterion: random\ncriterion_options: {sed: 1}\n", "no option 'sed'. It has: seed"),
        ("model: m\ndata: d\ncriterion_options: {seed: 1}\n", "need a criterion"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        load_recipe(write(tmp_path, text))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB + MINIMAL,
        "a: &a [*a]\n" + MINIMAL,
        MINIMAL + "policy_options: " + "[" * 500 + "]" * 500 + "\n",
        MINIMAL + "policy_options: " + "{a: " * 100_000,
        MINIMAL + "run_name: 2026-99-99\n",
        MINIMAL + "seed: !!int abc\n",
        MINIMAL + "seed: " + "9" * 5000 + "\n",
        MINIMAL + "run_name: !!python/object/apply:os.getcwd []\n",
        "x" * 2**21,
    ],
    ids=["bomb", "endless", "nested", "deep", "date", "int", "digits", "code", "long"],
)
def test_hostile_yaml_is_one_error_at_once(tmp_path: Path, text: str) -> None:
    with pytest.raises(SurgicalError) as raised:
        load_recipe(write(tmp_path, text))
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "/".join(["x" * 200] * 30)], ids=["long", "zero", "path"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(SurgicalError):
        load_recipe(tmp_path / name)
    for key in ("model", "data"):
        with pytest.raises(SurgicalError, match=key):
            recipe_of({"model": "m", "data": "d", "blocks": [0], key: name})


def test_a_secret_has_no_place_in_a_recipe(tmp_path: Path) -> None:
    """It was published with the card, the report and the study."""
    with pytest.raises(SurgicalError, match="hub_token") as raised:
        load_recipe(write(tmp_path, MINIMAL + "hub_token: hf_secret\n"))
    assert "hf_secret" not in str(raised.value)


MEANINGLESS: dict[str, list[Any]] = {
    "learning_rate": [-1.0, 0.0],
    "num_train_epochs": [0, -1],
    "max_steps": [0, -5],
    "per_device_train_batch_size": [0, -1],
    "per_device_eval_batch_size": [0],
    "gradient_accumulation_steps": [0, -1],
    "eval_accumulation_steps": [0],
    "weight_decay": [-1.0],
    "adam_beta1": [-0.1, 1.0, 2.0],
    "adam_beta2": [1.0],
    "adam_epsilon": [-1.0],
    "max_grad_norm": [-1.0],
    "warmup_steps": [-1],
    "label_smoothing_factor": [-0.1, 1.0],
    "save_steps": [-1, 0],
    "logging_steps": [-1],
    "save_total_limit": [0, -1],
    "seed": [-1, 2**40, 2**70],
    "data_seed": [-1],
    "dataloader_num_workers": [-1, 10**6],
    "train_sampling_strategy": ["randum"],
    "optim": ["adam", "adamw_torch_xl"],
    "optim_args": ["betas", "nonsense=3"],
    "lr_scheduler_type": ["cosin"],
    "lr_scheduler_kwargs": [{"nonsense": 3}, "not json"],
    "accelerator_config": [{"nonsense": 3}],
    "debug": ["nonsense"],
    "fsdp": ["nonsense"],
    "report_to": [53, "nonsense", [53]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in MEANINGLESS.items() for value in values])
def test_training_arguments_that_mean_nothing_are_refused_with_their_key(key: str, value: Any) -> None:
    """They raised whatever they liked after the data were loaded and measured, trained nothing, or were ignored."""
    with pytest.raises(SurgicalError, match=f"{key[:4]}.*"):
        recipe_of({"model": "m", "data": "d", "blocks": [0], key: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_of_a_recipe_is_nan_or_infinite(value: float) -> None:
    for key in ("learning_rate", "warmup_steps", "save_steps", "weight_decay", "max_grad_norm"):
        with pytest.raises(SurgicalError, match=key):
            recipe_of({"model": "m", "data": "d", "blocks": [0], key: value})
    for key in ("policy_options", "columns", "methods", "rates"):
        nested: Any = [{"a": [1, value]}] if key in ("methods", "rates") else {"a": [1, value]}
        with pytest.raises(SurgicalError, match=key):
            recipe_of({"model": "m", "data": "d", "blocks": [0], key: nested})


@pytest.mark.parametrize(
    "keys",
    [
        {"optim": "sgd", "optim_args": "momentum=0.9", "warmup_steps": 0.1},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"max_steps": 20, "weight_decay": 0.01, "max_grad_norm": 0, "seed": 2**32 - 1},
        {"save_strategy": "steps", "save_steps": 0.5, "save_total_limit": 1, "dataloader_num_workers": 1},
    ],
)
def test_training_arguments_that_mean_something_are_taken(keys: dict[str, Any]) -> None:
    assert recipe_of({"model": "m", "data": "d", "blocks": [0], **keys}).training == keys


def test_a_renamed_key_says_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(load.RENAMED, "units", "blocks")
    with pytest.raises(SurgicalError, match=r"'units'.*'blocks'"):
        load_recipe(write(tmp_path, "model: m\ndata: d\nunits: [0]\n"))


def test_renamed_keys_name_keys_that_exist() -> None:
    keys = {entry.name for entry in fields(Recipe)}
    assert not load.RENAMED.keys() & keys and set(load.RENAMED.values()) <= keys


def test_the_keys_of_finished_studies_and_comparisons_stay(tmp_path: Path) -> None:
    """Studies and findings are known by these, so they may never change for a recipe that does not."""
    text = "seed: 3\ndata: d\nmodel: m\nrates: [1e-3]\nmethods: [full]\nfrozen_eval: true\n"
    recipe = replace(load_recipe(write(tmp_path, text)), model="other", folds=2, blocks=[0])
    assert json.dumps(recipe.keys()) == (
        '{"seed": 3, "data": "d", "model": "other", "rates": [0.001], "methods": ["full"], "frozen_eval": true, '
        '"blocks": [0], "folds": 2}'
    )
    assert (
        json.dumps(recipe.settings()) == '{"seed": 3, "data": "d", "model": "other", "frozen_eval": true, "folds": 2}'
    )
    assert json.dumps(Recipe(model="m", data="d", training={"seed": 1}).keys()) == (
        '{"model": "m", "data": "d", "seed": 1}'
    )


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(SurgicalError, match="no recipe"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(model="m", data="d", policy="layer_decai"), "'layer_decay'"),
        (Recipe(model="m", data="d", policy="layer_decay", policy_options={"rate": 1}), "layer_decay"),
    ],
)
def test_a_wrong_policy_is_named_before_anything_is_loaded(recipe: Recipe, message: str) -> None:
    with pytest.raises(SurgicalError, match=message):
        recipe.make_policy()


def test_criterion_options_reach_the_criterion(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "model: m\ndata: d\ncriterion: random\ncriterion_options: {seed: 3}\n"))
    made = recipe.make_criterion()
    assert made.func is criteria.random and made.keywords == {"seed": 3}  # type: ignore[union-attr]
    assert recipe.config().criterion is not None
