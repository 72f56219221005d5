"""Of all commands, none imports what a file names unless it runs a recipe whose code may run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForImageClassification

from surgical_peft.cli.main import app
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.training.train import train
from tests.support.cli import run
from tests.support.hub_server import TOKEN, running_hub
from tests.support.marked import Marked, marked
from tests.support.tiny import write_recipe

BRINGS: dict[str, Any] = {
    "criterion": "marked:score",
    "policy": "marked:forgets",
    "procedure": "marked:forgets",
    "methods": ["full", "marked:forgets", {"policy": {"name": "marked:forgets"}}],
    "metric": "./script",
}
COMMANDS: dict[str, tuple[list[str], int]] = {  # what to call each with, and the exit code
    "start": (["{foreign}", "{data}", "--recipe", "{folder}/new.yaml"], 2),
    "recipe": (["--keys"], 0),
    "blocks": (["{foreign}"], 2),
    "score": (["{recipe}"], 2),
    "search": (["{recipe}", "--dry-run"], 0),
    "compare": (["{recipe}", "--dry-run"], 0),
    "advise": (["{recipe}", "--dry-run"], 0),
    "train": (["{recipe}"], 2),
    "doctor": (["{recipe}"], 2),
    "predict": (["{run}", "{folder}/none.png"], 2),
    "export": (["{run}/adapter", "{folder}/out", "--format", "merged"], 2),
    "emit": (["{recipe}", "--for", "trl"], 2),
    "card": (["{run}"], 0),
    "push": (["{run}", "someone/one"], 0),
}
READS_NO_CODE = {"quickstart", "patch"}  # nothing that is the user's, or safetensors alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a model, and a run with its adapter, report and scores; all name code."""
    folder = tmp_path_factory.mktemp("fetched")
    train(load_recipe(write_recipe(folder, blocks=[0], max_steps=1)))
    (folder / "script").mkdir()
    (folder / "script" / "script.py").write_text("import marked\n")
    shutil.copytree(folder / "model", folder / "foreign")
    (folder / "foreign" / "mine.py").write_text("import marked\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageClassification"), "mine.Any")
    edit(folder / "foreign" / "config.json", auto_map=auto_map, model_type="of_its_own")
    choice = {"criterion": "marked:score", "procedure": "marked:forgets", "policy": "marked:forgets"}
    mapping = {"base_model_class": "forgets", "parent_library": "marked"}
    report = json.loads((folder / "run" / "report.json").read_text())
    recipe, rates = {**report["recipe"], **choice}, {**report["rates"], "policy": "marked:forgets"}
    edit(folder / "run" / "report.json", recipe=recipe, rates=rates, task="marked:task", metric="marked:score")
    edit(folder / "run" / "adapter" / "adapter_config.json", selection=choice, auto_mapping=mapping, task_type=None)
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Marked:
    monkeypatch.chdir(tmp_path)
    return marked(tmp_path, monkeypatch)


def test_every_command_is_here() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert set(names) == COMMANDS.keys() | READS_NO_CODE


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_nothing_that_a_file_names(
    command: str, folder: Path, code: Marked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = COMMANDS[command]
    recipe = write_recipe(folder, blocks="auto", num_train_epochs=1, **BRINGS)
    places = {"recipe": recipe, "run": folder / "run", "foreign": folder / "foreign", "data": folder / "data"}
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", command != "push")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        filled = [argument.format(folder=folder, **places) for argument in arguments]
        assert run(monkeypatch, command, *filled) == expected, capsys.readouterr().err
    assert not code.ran
    if "--dry-run" in arguments:
        told = capsys.readouterr().err
        assert all(f"{key} " in told for key in BRINGS) and "marked:forgets" in told


def test_a_dry_run_says_that_it_knows_nothing_without_the_task(
    folder: Path, code: Marked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(folder, task="marked:task", methods=["full"])
    for command in ("search", "compare", "advise"):
        assert run(monkeypatch, command, str(recipe), "--dry-run", "--allow-code") == 2
        assert "marked:task" in capsys.readouterr().err and not code.ran


def test_loading_an_adapter_imports_nothing_that_it_names(folder: Path, code: Marked) -> None:
    base = AutoModelForImageClassification.from_pretrained(folder / "model")
    PeftModel.from_pretrained(base, folder / "run" / "adapter")
    assert not code.ran
