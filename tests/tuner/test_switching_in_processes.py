"""DDP, FSDP2 and ZeRO on two processes do what one process does while sets of weights are switched, saved, loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from surgical_peft import SurgicalConfig
from tests.support.launched_switching import BLOCKS, EXAMPLES, accelerator, play, toy

REPOSITORY = Path(__file__).parents[2]
NO_DEEPSPEED = find_spec("deepspeed") is None or shutil.which("g++") is None
WAYS = {  # with what they are tried on; the last two are about how FSDP2 reads and shards weights
    "ddp": ["llama"],
    "fsdp2": ["llama", "llama_tied", "new_head"],
    "zero2": ["llama"],
    "zero3": ["llama"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family the base model, and an adapter `second` for it."""
    folder = tmp_path_factory.mktemp("distributed")
    for family, blocks in BLOCKS.items():
        base: Any = toy(family).model()
        kept = {n: t for n, t in base.state_dict().items() if family != "new_head" or not n.startswith("lm_head.")}
        base.save_pretrained(folder / family / "base", state_dict=kept)
        model = get_peft_model(base, SurgicalConfig(blocks=blocks["second"]), "second")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.2 if parameter.requires_grad else 1.0)
        model.save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process does."""
    runtime = accelerator()
    where = {family: folder / family for family in BLOCKS}
    return {
        family: play(runtime, there / "base", there / "second", there / "one", family)
        for family, there in where.items()
    }


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What two processes tell: for each way, of each family that it is tried on."""
    ways = {way: families for way, families in WAYS.items() if not (NO_DEEPSPEED and way.startswith("zero"))}
    command = [sys.executable, "-m", "tests.support.launched_switching", str(folder), json.dumps(ways)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {way: json.loads((folder / f"{way}.json").read_text()) for way in ways}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_switch_save_and_load_as_one_does(
    way: str, folder: Path, one: dict[str, dict[str, Any]], two: dict[str, list[dict[str, Any]]]
) -> None:
    if way not in two:
        pytest.skip("DeepSpeed on a CPU needs a C++ compiler")
    assert [told["family"] for told in two[way]] == WAYS[way]
    for told in two[way]:
        family = told["family"]
        expected = one[family]["losses"]
        assert told["distributed"] == {"ddp": "MULTI_CPU", "fsdp2": "fsdp2"}.get(way, "DEEPSPEED")
        assert told["processes"] == 2
        for name, loss in told["losses"].items():
            assert loss == pytest.approx(expected[name], abs=1e-5), f"{family}, {name}"
        assert told["losses"].keys() == expected.keys()
        three = [expected[name] for name in ("first in the end", "base afterwards", "second read as third")]
        assert min(abs(three[i] - three[i - 1]) for i in range(3)) > 1e-3  # else one might have stood for another
        check_saved(folder / family, way, family, expected)
        # a step tells the other process the same, whether or not other sets of weights are parked beside
        assert told["beside others"] == told["alone"], family
        first = load_file(folder / family / way / "first" / "adapter_model.safetensors")
        tuned = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
        for step in told["alone"]:
            reduced = [size for kind, (_, size) in step.items() if kind in ("allreduce", "_reduce_scatter_base")]
            assert sum(reduced) >= tuned, family


def check_saved(there: Path, way: str, family: str, losses: dict[str, float]) -> None:
    """Both adapters were saved as one process saves them, and one process can read them."""
    for adapter in ("first", "second"):
        ours, theirs = (load_file(there / who / adapter / "adapter_model.safetensors") for who in (way, "one"))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.allclose(ours[key], tensor, rtol=1e-4, atol=1e-5), f"{family}, {adapter}, {key}"
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(there / "base"), there / way / "first", "first"
    ).eval()
    model.load_adapter(there / way / "second", "second")
    for adapter, name in {"first": "first once saved", "second": "second read as third"}.items():
        model.set_adapter(adapter)
        with torch.no_grad():
            loss = model(**toy(family).batch(seed=100, size=EXAMPLES)).loss.item()
        assert loss == pytest.approx(losses[name], abs=1e-5), f"{family}, {adapter}"
