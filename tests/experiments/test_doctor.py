"""`surgical-peft doctor`: of recipes, adapters and models, with an exit code for CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForImageClassification, BertConfig, BertModel

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.experiments.doctor import doctor_of_model, doctor_of_recipe
from surgical_peft.experiments.recipe import load_recipe
from tests.support.cli import run
from tests.support.families import FAMILIES
from tests.support.tiny import write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its model and data, and an adapter in the place of its run."""
    folder = tmp_path_factory.mktemp("doctor")
    write_recipe(folder, blocks="auto", lr_scheduler_type="linear", warmup_steps=3)
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    get_peft_model(model, SurgicalConfig(blocks=[1])).save_pretrained(folder / "run" / "adapter")
    return folder


def trained(diagnosis: Any) -> set[str]:
    return {tensor.block for tensor in diagnosis.tensors if tensor.moved}


def test_a_recipe(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*"))
    diagnosis = doctor_of_recipe(load_recipe(folder / "recipe.yaml"))
    assert diagnosis.is_healthy and trained(diagnosis) == {"1"}  # of its own run
    assert sorted(folder.rglob("*")) == files
    given = load_recipe(write_recipe(tmp_path, blocks=[0, 1], policy="lisa", policy_options={"num_blocks": 1}))
    diagnosis = doctor_of_recipe(given)
    assert diagnosis.is_healthy and trained(diagnosis) < {"0", "1"}
    assert trained(doctor_of_recipe(given, folder / "run")) == {"1"}
    with pytest.raises(SurgicalError, match="auto"):
        doctor_of_recipe(load_recipe(write_recipe(tmp_path, blocks="auto")))


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_a_model_on_made_up_input(name: str, tmp_path: Path) -> None:
    model: Any = FAMILIES[name].model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    diagnosis = doctor_of_model(str(tmp_path))
    assert diagnosis.is_healthy and all(tensor.moved and tensor.master for tensor in diagnosis.tensors)


def test_an_adapter_of_a_model(folder: Path) -> None:
    assert trained(doctor_of_model(str(folder / "model"), folder / "run")) == {"1"}
    assert trained(doctor_of_model(str(folder / "model"), folder / "run" / "adapter")) == {"1"}


def test_what_no_input_is_made_up_for_is_refused(tmp_path: Path) -> None:
    model: Any = FAMILIES["whisper"].model()
    model.save_pretrained(tmp_path)
    with pytest.raises(SurgicalError, match="input_features"):
        doctor_of_model(str(tmp_path))
    with pytest.raises(SurgicalError, match="none-such"):
        doctor_of_model(str(tmp_path / "none-such"))


def test_the_command_and_its_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", str(folder / "recipe.yaml")) == 0
    assert "No faults" in capsys.readouterr().out
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, vocab_size=24, max_position_embeddings=16)).save_pretrained(tmp_path)
    assert run(monkeypatch, "doctor", str(tmp_path), "--json") == 1  # no loss asks for the pooler
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert faults == {"no_gradient": ["pooler.dense.weight", "pooler.dense.bias"]}
    assert run(monkeypatch, "doctor", str(tmp_path), "--tiny") == 2
