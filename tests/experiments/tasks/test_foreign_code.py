"""Code that lies in a model's folder is neither run nor asked about."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import surgical_peft
from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.cli.architectures import model_of_config
from surgical_peft.experiments import tasks
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.start.start import guess_task
from surgical_peft.export.processor import processor_of
from surgical_peft.tuner.loading.saved_adapter import load_base

VIT = Path(__file__).parents[3] / "recipes" / "fashion_mnist" / "vit"
DATA = VIT.parent / "target-0"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model whose classes are in its own folder, where their code leaves a file."""
    folder, ran = shutil.copytree(VIT, tmp_path / "model"), tmp_path / "ran"
    classes = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model", "AutoTokenizer": ["mine.Model", None]}
    classes |= {f"AutoModelFor{task}Classification": "mine.Model" for task in ("Image", "Sequence")}
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        values |= {"auto_map": {**classes, "AutoImageProcessor": "mine.Model"}, "model_type": "of_its_own"}
        (folder / name).write_text(json.dumps(values))
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder, ran


def loaded(task: str, name: str, allow_code: bool = False) -> Any:
    recipe = Recipe(model=name, data=str(DATA), task=task, allow_code=allow_code)
    return getattr(tasks, task)(recipe, ("train",))


LOADS: dict[str, Callable[[str], Any]] = {
    "blocks": model_of_config,
    **{task: partial(loaded, task) for task in tasks.__all__},
    "start": lambda name: guess_task(name, str(DATA), {}),
    "export": lambda name: load_base(SurgicalConfig(blocks=[0], base_model_name_or_path=name), {}),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_the_code_of_a_model_is_not_run(load: Callable[[str], Any], model: tuple[Path, Path]) -> None:
    """`yes | surgical-peft train` ran it."""
    folder, ran = model
    with pytest.raises(SurgicalError, match="cannot be loaded"):
        load(str(folder))
    assert not ran.exists()


def test_it_is_not_run_for_its_processor(model: tuple[Path, Path]) -> None:
    folder, ran = model
    processor_of(folder)
    assert not ran.exists()


@pytest.mark.parametrize("task", ["image_classification", "causal_lm"])
def test_one_flag_allows_it(task: str, model: tuple[Path, Path]) -> None:
    """The same that lets a recipe's own code run."""
    folder, ran = model
    with pytest.raises(SurgicalError, match="allow-code"):
        loaded(task, str(folder))
    with suppress(Exception):  # the class in it is none
        loaded(task, str(folder), allow_code=True)
    assert ran.exists()


def test_whoever_loads_by_an_auto_class_says_whether_code_may_run() -> None:
    """Each `AutoX.from_pretrained` is given `trust_remote_code`, or goes to a function that gives it."""
    package = Path(surgical_peft.__file__).parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        covered = {id(part) for call in calls if name_of(call) in ("load_pretrained", "_found") for part in call.args}
        covered |= {id(call.func) for call in calls if "trust_remote_code" in [word.arg for word in call.keywords]}
        for node in ast.walk(tree):
            is_loader = isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
            if is_loader and "Auto" in ast.unparse(node) and "quickstart" not in path.parts:  # whose model ships
                assert id(node) in covered, f"{path}: {ast.unparse(node)}"


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""
