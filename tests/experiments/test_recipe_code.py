"""Code that a recipe names is imported when something runs, not before; another's only if it is allowed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from surgical_peft import SurgicalError
from surgical_peft.experiments.advise.advise import advise
from surgical_peft.experiments.compare.compare import compare
from surgical_peft.experiments.compare.comparison import Comparison
from surgical_peft.experiments.recipe import Recipe, load_recipe, recipe_of
from surgical_peft.experiments.recipe.code import code_of, for_dry_run, is_own, without_code
from surgical_peft.experiments.search.search import search
from surgical_peft.experiments.tasks import load_task
from surgical_peft.experiments.training.train import score, train
from tests.support.cli import run
from tests.support.marked import Marked, marked
from tests.support.tiny import write_recipe

BRINGS: dict[str, dict[str, Any]] = {
    "task": {"task": "marked:task"},
    "criterion": {"criterion": "marked:score"},
    "criterion with options": {"criterion": "marked:score", "criterion_options": {"a": 1}},
    "policy": {"policy": "marked:forgets"},
    "criterion of a policy": {"policy": "auto_snr", "policy_options": {"criterion": "marked:score"}},
    "loss of a stage": {"policy": "stages", "policy_options": {"plan": [{"loss": "marked:score"}]}},
    "procedure": {"procedure": "marked:forgets"},
    "method": {"methods": ["full", "marked:forgets"]},
    "method with options": {"methods": ["full", {"marked:forgets": {"k": 1}}]},
    "policy of a method": {"methods": ["full", {"policy": {"name": "marked:forgets"}}]},
    "criterion of a method": {"methods": ["full", {"top_k": {"criterion": "marked:score"}}]},
    "procedure of a method": {"methods": ["full", {"searched": {"procedure": "marked:forgets"}}]},
    "metric": {"metric": "./script"},
    "further metric": {"test_metrics": {"./script": None}},
}
RUNS: list[Callable[[Recipe], Any]] = [
    train,
    score,
    search,
    compare,
    advise,
    lambda recipe: load_task(recipe),
    lambda recipe: recipe.make_policy(),
    lambda recipe: recipe.make_criterion(),
    lambda recipe: recipe.make_procedure(),
    lambda recipe: Comparison(recipe),
]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Marked:
    return marked(tmp_path, monkeypatch)


@pytest.mark.parametrize("keys", BRINGS.values(), ids=BRINGS)
def test_a_recipe_from_elsewhere_imports_nothing(keys: dict[str, Any], code: Marked, tmp_path: Path) -> None:
    """Not when it is read, and not by any door when it runs."""
    recipe = load_recipe(write_recipe(tmp_path / "fetched", **{"methods": ["full", "head"], **keys}))
    assert code_of(recipe)
    (tmp_path / "fetched" / "script").mkdir()
    refused = 0
    for begin in RUNS[:5]:
        with pytest.raises(SurgicalError, match="--allow-code"):
            begin(recipe)
    for begin in RUNS[5:]:
        try:
            begin(recipe)
        except SurgicalError as error:
            refused += "--allow-code" in str(error)
    assert refused == 1 and not code.ran and not (tmp_path / "fetched" / "run").exists()


def test_it_is_imported_when_it_is_allowed(code: Marked, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "fetched", policy="marked:forgets")
    recipe = load_recipe(path, allow_code=True)
    assert not code.ran
    with pytest.raises(SurgicalError, match=r"marked:forgets.*NoneType"):
        train(recipe)
    assert code.ran and not (path.parent / "run" / "adapter").exists()


@pytest.mark.parametrize("key", ["policy", "procedure", "task", "method"])
def test_a_function_that_forgets_to_return_is_an_error_before_training(
    key: str, code: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a policy it was a training without one, whose card and report named it."""
    monkeypatch.chdir(tmp_path)
    keys = {"methods": ["full", "marked:forgets"]} if key == "method" else {key: "marked:forgets"}
    recipe = load_recipe(write_recipe(tmp_path / "mine", **keys))
    begin = {"procedure": search, "method": compare}.get(key, train)
    with pytest.raises(SurgicalError, match=r"marked:forgets.*NoneType"):
        begin(recipe)
    assert code.ran


def test_which_recipes_are_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr(constants, "HF_HOME", str(home / ".cache" / "huggingface"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / ".cache" / "huggingface" / "hub"))
    cached = home / ".cache" / "huggingface" / "hub" / "models--a--b" / "snapshots" / "c" / "recipe.yaml"
    fetched = home / "here" / "fetched" / "recipes" / "recipe.yaml"
    note = home / "here" / "fetched" / ".cache" / "huggingface" / "download" / "recipes" / "recipe.yaml.metadata"
    mine, other = home / "here" / "mine" / "recipe.yaml", tmp_path / "other.yaml"
    for file in (cached, fetched, note, mine, other):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    link = home / "here" / "link.yaml"
    link.symlink_to(other)
    monkeypatch.chdir(home)
    assert is_own(mine) and is_own(Path("here/mine/recipe.yaml")) and is_own(Path("here/mine/../mine/recipe.yaml"))
    assert not any(map(is_own, (cached, fetched, link, other, Path("../other.yaml"))))
    monkeypatch.chdir(home / "here" / "mine")
    assert is_own(mine) and not is_own(fetched)
    monkeypatch.chdir(fetched.parent)  # the note of what was fetched lies above
    assert not is_own(fetched)


def test_a_cache_of_the_hub_below_the_working_directory_is_not_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = tmp_path / "cache" / "models--a--b" / "blobs" / "0123"
    linked = tmp_path / "cache" / "models--a--b" / "snapshots" / "c" / "recipe.yaml"
    for file in (blob, linked):
        file.parent.mkdir(parents=True)
    blob.touch()
    linked.symlink_to(blob)
    monkeypatch.chdir(tmp_path)
    assert not is_own(linked)


def test_a_dry_run_without_any_method_left_tells_no_cost(code: Marked, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "fetched", methods=["marked:forgets"]))
    with pytest.raises(SurgicalError, match="methods"):
        for_dry_run(recipe)
    assert not code.ran


def test_what_is_given_in_python_or_on_the_command_line_is_asked_for(
    code: Marked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "fetched", criterion="random")
    assert run(monkeypatch, "score", str(path), "--criterion", "marked:score", "--json") == 0
    assert code.ran and '"marked:score"' in capsys.readouterr().out
    Recipe(model="m", data="d", criterion="marked:score", criterion_options={}).check_run()


def test_keys_without_a_file_bring_no_code(code: Marked) -> None:
    """As of a report: nobody knows where it is from."""
    recipe = recipe_of({"model": "m", "data": "d", "policy": "marked:forgets"})
    with pytest.raises(SurgicalError, match="allow_code"):
        recipe.make_policy()
    assert not code.ran


def test_a_metric_of_the_hub_is_code_that_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_recipe(tmp_path, metric="acuracy"))
    with pytest.raises(SurgicalError, match=r"'acuracy'.*'accuracy'.*--allow-code"):
        train(recipe)


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_the_command_says_which_modules_it_imports(
    json: list[str],
    code: Marked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_recipe(tmp_path / "fetched", blocks="auto", criterion="marked:score")
    assert run(monkeypatch, "score", str(path), *json) == 2 and not code.ran
    assert "criterion" in capsys.readouterr().err
    assert run(monkeypatch, "score", str(path), "--allow-code", *json) == 0 and code.ran
    assert "marked (criterion)" in capsys.readouterr().err
    monkeypatch.chdir(path.parent)
    assert run(monkeypatch, "score", "recipe.yaml", *json) == 0
    assert "marked (criterion)" in capsys.readouterr().err


@pytest.mark.parametrize("keys", BRINGS.values(), ids=BRINGS)
def test_what_is_left_out_of_an_estimate_is_told(keys: dict[str, Any], code: Marked, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "fetched", **keys))
    left, notes = without_code(recipe)
    assert code_of(left) == code_of(recipe, "task") and len(notes) == ("task" not in keys) and not code.ran
    assert left.methods == (["full"] if "methods" in keys else None)


def test_names_of_this_package_are_no_code(tmp_path: Path) -> None:
    keys = {"policy": "lisa", "policy_options": {"num_blocks": 1}, "criterion": "rgn", "procedure": "sweep"}
    methods = ["full", {"blocks": {"names": ["0:2"]}}, {"top_k": {"criterion": "rgn"}}]
    recipe = load_recipe(write_recipe(tmp_path, metric="macro_f1", methods=methods, **keys))
    assert code_of(recipe) == [] and sys.modules.get("marked") is None


@pytest.mark.parametrize("key", ["output_dir", "push_to_hub", "hub_model_id", "report_to"])
def test_a_recipe_from_elsewhere_writes_and_pushes_nowhere_else(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"push_to_hub": True, "hub_model_id": "someone/one", "report_to": "wandb"}
    path = write_recipe(tmp_path / "fetched", **{key: values.get(key, "../theirs"), "methods": ["full"]})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(path)
    for begin in (train, search, compare, advise):
        with pytest.raises(SurgicalError, match=key if key in values else "theirs"):
            begin(recipe)
    assert not (tmp_path / "theirs").exists()
    if key == "output_dir":
        recipe.check_run(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    load_recipe(path).check_run()
