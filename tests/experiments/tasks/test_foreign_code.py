"""Code that lies in a model's folder is neither run nor asked about."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.cli.architectures import model_of_config
from surgical_peft.experiments.recipe.recipe import Recipe
from surgical_peft.experiments.tasks import image_classification, text_classification
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


LOADS: dict[str, Callable[[str], Any]] = {
    "blocks": model_of_config,
    "image task": lambda name: image_classification(Recipe(model=name, data=str(DATA)), ("train",)),
    "text task": lambda name: text_classification(
        Recipe(model=name, data=str(DATA), task="text_classification"), ("train",)
    ),
    "export": lambda name: load_base(SurgicalConfig(blocks=[0], base_model_name_or_path=name), {}),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_the_code_of_a_model_is_not_run(load: Callable[[str], Any], model: tuple[Path, Path]) -> None:
    """`yes | surgical-peft train` ran it."""
    folder, ran = model
    with pytest.raises(SurgicalError, match="cannot be loaded"):
        load(str(folder))
    assert not ran.exists()
