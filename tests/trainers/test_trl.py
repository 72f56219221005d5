"""`recipes/trl_sft.py`, run as its user runs it but for the model and the data."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[2] / "recipes" / "trl_sft.py"


def test_the_recipe_tunes_its_blocks_each_at_its_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = runpy.run_path(str(RECIPE))["main"](["--tiny", "--output", str(tmp_path)])
    assert "its numbers mean nothing" in capsys.readouterr().out
    assert trainer.state.global_step == 2
    saved = load_file(tmp_path / "tiny" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "tiny" / "adapter_config.json").read_text())
    assert config["blocks"] == ["0", "1", "26", "27"]
    assert {name.split(".layers.")[1].split(".")[0] for name in saved} == set(config["blocks"])
    merged = trainer.model.merge_and_unload()
    base = runpy.run_path(str(RECIPE))["tiny"](tmp_path / "again")[0]  # the same weights every time
    before = load_file(Path(base) / "model.safetensors")
    for name, weight in merged.named_parameters():
        if name in before:  # not the head, which is tied
            tuned = f".layers.{name.split('.layers.')[-1].split('.')[0]}." in [f".layers.{i}." for i in (0, 1, 26, 27)]
            assert torch.equal(weight, before[name]) != tuned, name
    rates = {group["block"]: group["base_multiplier"] for group in trainer.optimizer.param_groups}
    assert rates["27"] > rates["26"] > rates["1"] > rates["0"]
