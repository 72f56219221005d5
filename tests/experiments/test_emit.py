"""`surgical-peft emit`: what a choice is read from, and what is refused before a word is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from surgical_peft import BlockScores, Selection, SurgicalConfig, SurgicalError
from surgical_peft.experiments.emit import emit
from surgical_peft.search.result import SearchResult, SearchTrial
from tests.support.cli import run
from tests.support.families import FAMILIES
from tests.support.wrapping import nudge

NAMES = ("embeddings", "0", "1", "2", "final_norm", "head")
LAST = ["^model.layers.2."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers, the same with twice the vocabulary, and an adapter of its last layer."""
    folder = tmp_path_factory.mktemp("emit")
    model: Any = FAMILIES["llama"].model()
    model.save_pretrained(folder / "llama")
    model.resize_token_embeddings(48)
    model.save_pretrained(folder / "other")
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    tuned = get_peft_model(base, SurgicalConfig(blocks=[-1], task_type="CAUSAL_LM"))
    nudge(tuned).save_pretrained(folder / "run" / "adapter")
    return folder


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**keys: Any) -> Path:
        own = {"model": str(folder / "llama"), "data": "none", "task": "causal_lm", "blocks": [-1], **keys}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(own))
        return path

    return write


def searched(path: Path, *best: str, names: tuple[str, ...] = NAMES) -> Path:
    SearchResult(Selection(best), 0.5, (SearchTrial(best, 0.5, 1.0),), names, "sweep()").save(path)
    return path


def patterns(text: str) -> list[str]:
    return yaml.safe_load(text)["unfrozen_parameters"]


def test_a_recipe(folder: Path, recipe: Callable[..., Path]) -> None:
    emission = emit(recipe(), "axolotl")
    assert patterns(emission.text) == LAST
    assert yaml.safe_load(emission.text)["base_model"] == str(folder / "llama")


def test_the_folder_of_a_run_or_of_its_adapter(folder: Path, recipe: Callable[..., Path]) -> None:
    assert patterns(emit(folder / "run", "axolotl").text) == LAST
    assert patterns(emit(folder / "run" / "adapter", "axolotl").text) == LAST
    chosen_in_training = recipe(blocks="auto", output_dir=str(folder / "run"))
    assert patterns(emit(chosen_in_training, "axolotl").text) == LAST


def test_a_search_of_blocks_and_of_parts(folder: Path, tmp_path: Path) -> None:
    base = str(folder / "llama")
    file = searched(tmp_path / "search.json", "2")
    assert patterns(emit(file, "axolotl", base_model=base).text) == LAST
    parts = ("embeddings", *(f"{n}/{part}" for n in "012" for part in ("self_attn", "mlp")), "final_norm", "head")
    file = searched(tmp_path / "parts.json", "1/mlp", "head", names=parts)
    emission = emit(file, "axolotl", base_model=base)
    assert patterns(emission.text) == ["^model.layers.1.mlp.", "^lm_head."]


def test_saved_scores(folder: Path, tmp_path: Path) -> None:
    sizes = {"embeddings": 384, "0": 2336, "1": 2336, "2": 2336, "final_norm": 16, "head": 384}
    blocks = {name: name for name in NAMES}
    scores = {name: float(name == "2") for name in NAMES[:-1]}
    file = tmp_path / "scores.json"
    BlockScores(scores, sizes, blocks, ("head",), "rgn", "block", 2, "LlamaForCausalLM").save(file)
    base = str(folder / "llama")
    assert patterns(emit(file, "axolotl", base_model=base, num_blocks=1).text) == LAST
    with pytest.raises(SurgicalError, match="--num-blocks"):
        emit(file, "axolotl", base_model=base)
    with pytest.raises(SurgicalError, match="'embeddings'"):  # half as large
        emit(file, "axolotl", base_model=str(folder / "other"), num_blocks=1)


def test_a_choice_of_another_model_is_refused(folder: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    base = str(folder / "llama")
    with pytest.raises(SurgicalError, match="'3'"):
        emit(searched(tmp_path / "deeper.json", "2", names=(*NAMES[:4], "3", *NAMES[4:])), "axolotl", base_model=base)
    with pytest.raises(SurgicalError, match="'2'"):
        emit(searched(tmp_path / "flat.json", "1", names=(*NAMES[:3], *NAMES[4:])), "axolotl", base_model=base)
    with pytest.raises(SurgicalError, match="7"):
        emit(recipe(blocks=[7]), "axolotl")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), SurgicalConfig(blocks=["head"]))
    nudge(tuned).save_pretrained(tmp_path / "head")
    with pytest.raises(SurgicalError, match=r"lm_head\.weight"):
        emit(tmp_path / "head", "axolotl", base_model=str(folder / "other"))


def test_what_holds_no_choice_is_refused(folder: Path, tmp_path: Path, recipe: Callable[..., Path]) -> None:
    with pytest.raises(SurgicalError, match="train"):
        emit(recipe(blocks="auto", output_dir=str(tmp_path / "none")), "axolotl")
    with pytest.raises(SurgicalError, match="--base"):
        emit(searched(tmp_path / "search.json", "2"), "axolotl")
    with pytest.raises(SurgicalError, match="--num-blocks"):
        emit(folder / "run", "axolotl", num_blocks=1)
    for name in ("choice.txt", "none.json", "none.yaml", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SurgicalError, match=name):
            emit(tmp_path / name, "axolotl")
    with pytest.raises(SurgicalError, match="axolotl"):
        emit(folder / "run", "axolot")


def test_no_weights_of_the_model_are_read(folder: Path, recipe: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "llama" / "config.json").read_bytes())
    assert patterns(emit(recipe(model=str(tmp_path / "bare")), "axolotl").text) == LAST


def test_the_command(
    folder: Path, recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "emit", str(recipe()), "--for", "llama-factory") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["finetuning_type"] == "freeze" and config["freeze_trainable_layers"] == 1
    assert run(monkeypatch, "emit", str(folder / "run"), "--for", "ms-swift", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file"] == "ms_swift.yaml" and len(report["parameters"]) == 9
    assert run(monkeypatch, "emit", str(recipe(blocks=[1])), "--for", "llama-factory") == 2
    assert "freeze_trainable_layers" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "unsloth", None)  # no target needs its tool
    assert run(monkeypatch, "emit", str(recipe(blocks=[1])), "--for", "unsloth") == 0
