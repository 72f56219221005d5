"""`recipes/peft_method_comparison/`: PEFT reads the entry, its blocks are the criterion's, and its steps run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgical_peft import SurgicalConfig, SurgicalError, score_blocks, top_k

FOLDER = Path(__file__).parents[2] / "recipes" / "peft_method_comparison"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "metamathqa.py"))


def small_llama(layers: int = 28) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=8))


def test_the_entry_lies_where_peft_looks(script: dict[str, Any]) -> None:
    """`validate_experiment_path` of PEFT's utils.py: experiments/<peft-method>/<experiment-name>."""
    parts = script["ENTRY"].relative_to(FOLDER).parts
    assert len(parts) == 3 and parts[0] == "experiments"
    assert {path.name for path in script["ENTRY"].iterdir()} == {"adapter_config.json", "training_params.json"}


def test_the_blocks_are_the_middle_ones(script: dict[str, Any]) -> None:
    config, _ = script["read_entry"]()
    chosen = SurgicalConfig.from_selection(top_k(score_blocks(small_llama(), None, criterion="middle"), 5))
    assert (config.blocks, config.selection) == (chosen.blocks, chosen.selection)
    assert config.blocks == ["11", "12", "13", "14", "15"] and config.task_type == "CAUSAL_LM"


def test_pefts_own_checks_of_the_parameters_pass(script: dict[str, Any]) -> None:
    """`TrainConfig` of PEFT's utils.py, by its rules, and what it writes to its results."""
    config, params = script["read_entry"]()
    given = json.loads((script["ENTRY"] / "training_params.json").read_text())
    assert given.keys() <= script["DEFAULTS"].keys() == params.keys()
    assert params["dtype"] in ("float32", "float16", "bfloat16", "int8", "int4")
    assert min(params[name] for name in ("batch_size", "batch_size_eval", "max_steps", "eval_steps")) > 0
    assert params["eval_steps"] <= params["max_steps"] and params["grad_norm_clip"] >= 0
    assert params["lr_scheduler"] in (None, "cosine") and "{query}" in params["query_template"]
    getattr(torch.optim, params["optimizer_type"])([torch.zeros(1)], **params["optimizer_kwargs"])
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "SURGICAL"


def test_an_unknown_parameter_is_refused(script: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "training_params.json").write_text('{"learning_rate": 1}')
    with pytest.raises(SystemExit, match="learning_rate"):
        script["read_entry"](tmp_path)


def test_a_model_with_fewer_blocks_refuses_the_entry(script: dict[str, Any]) -> None:
    config, _ = script["read_entry"]()
    with pytest.raises(SurgicalError, match="does not exist"):
        script["get_peft_model"](small_llama(layers=12), config)


def test_the_tiny_run_passes_its_own_checks(script: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    report = script["main"](["--tiny"])
    assert "its numbers mean nothing" in capsys.readouterr().out
    assert report["blocks"] == ["11", "12", "13", "14", "15"]
    assert report["metrics"][-1].keys() == {"step", "test accuracy", "forgetting"}
    assert report["file_size"] > 2 * report["num_trainable_params"]


def test_what_it_needs_is_counted(script: dict[str, Any], tmp_path: Path) -> None:
    """Known beforehand: two bytes a weight; of what is tuned two more that are parked, and four of the optimizer."""
    model = small_llama(layers=16)
    model.config.save_pretrained(tmp_path)
    count, tuned = model.num_parameters(), 5 * sum(weight.numel() for weight in model.model.layers[0].parameters())
    script["cost"].__globals__["ARCHITECTURE"] = tmp_path
    entry, gib = script["cost"](*script["read_entry"]()), script["GIB"]
    assert entry["trained"] == tuned
    sizes = {"weights": 2 * (count + tuned), "optimizer": 4 * tuned, "base": 2 * count, "file": 2 * tuned}
    assert {name: entry[name] * gib for name in sizes} == pytest.approx(sizes, rel=0.01)
    assert entry["most"] > entry["peak"] > entry["weights"] + entry["optimizer"]
