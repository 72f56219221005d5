"""What only a fresh process can show: loading with our import, without it, and after unpickling."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import surgical_peft
from surgical_peft import SurgicalConfig
from tests.support.toys import TOYS

SCRIPT = """
import json, pickle, sys
from pathlib import Path
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageClassification, ViTForImageClassification

result = {}
for name, load in {
    "peft": lambda: PeftConfig.from_pretrained(sys.argv[1] + "/adapter"),
    "transformers": lambda: AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/adapter"),
}.items():
    try:
        load()
    except Exception as error:
        result[name] = repr(error)
assert "surgical_peft" not in sys.modules
config = pickle.loads(Path(sys.argv[1], "config.pickle").read_bytes())  # imports us, which registers the method
result["unpickled"] = [type(config).__module__, config.blocks, str(config.peft_type.value)]
result["after"] = type(PeftConfig.from_pretrained(sys.argv[1] + "/adapter")).__name__

import surgical_peft

base = ViTForImageClassification.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(base, sys.argv[1] + "/adapter", adapter_name="other")
batch, logits = torch.load(sys.argv[1] + "/answer.pt")
with torch.no_grad():
    result |= {"equal": torch.equal(model(**batch).logits, logits), "adapters": list(model.peft_config)}
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processes")
    vit = TOYS["vit"]
    vit.model().save_pretrained(directory / "base")
    model = get_peft_model(type(vit.model()).from_pretrained(directory / "base"), SurgicalConfig(blocks=[0, "head"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
        torch.save((vit.batch(), model(**vit.batch()).logits), directory / "answer.pt")
    model.save_pretrained(directory / "adapter")
    (directory / "config.pickle").write_bytes(pickle.dumps(model.peft_config["default"]))
    return directory


@pytest.fixture(scope="module")
def result(directory: Path) -> dict[str, Any]:
    """What a fresh process finds."""
    root = Path(surgical_peft.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(directory)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_our_import_peft_does_not_know_the_method_until_a_config_is_unpickled(result: dict[str, Any]) -> None:
    assert result["peft"] == result["transformers"] == "KeyError('SURGICAL')"
    assert result["unpickled"] == ["surgical_peft.tuner.config", ["0", "head"], "SURGICAL"]
    assert result["after"] == "SurgicalConfig"


def test_it_loads_the_adapter_under_another_name(result: dict[str, Any]) -> None:
    assert result["equal"] and result["adapters"] == ["other"]
