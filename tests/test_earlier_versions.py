"""Adapters as version 0.1.0 saved them, when it still wrapped a copy of each module (commit 37b8b3a)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from surgical_peft import SurgicalConfig
from tests.support.toys import TOYS

EARLIER = Path(__file__).parent / "earlier"
ADAPTERS = {"two": "llama", "cls": "bert", "parts": "bert"}  # LoRA beside blocks; a new head; biases only


def natively(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(folder)  # type: ignore[operator]
    return base


DOORS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "peft": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "transformers": natively,
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("door", DOORS)
def test_they_load_and_are_saved_again_as_they_were(name: str, door: str, tmp_path: Path) -> None:
    toy = TOYS[ADAPTERS[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = DOORS[door](toy.model(), EARLIER / name).eval()
    assert all(type(config) is SurgicalConfig for config in model.peft_config.values())
    expected = load_file(EARLIER / "logits.safetensors")[name]
    with torch.no_grad():
        torch.testing.assert_close(model(**toy.batch()).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    before, after = (load_file(each / "adapter_model.safetensors") for each in (EARLIER / name, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_second_one_loads_beside_it() -> None:
    model = PeftModel.from_pretrained(TOYS["llama"].model(), EARLIER / "two")
    model.load_adapter(EARLIER / "two" / "second", "second")
    model.set_adapter("second")
    saved = load_file(EARLIER / "two" / "second" / "adapter_model.safetensors")
    assert saved and all(torch.equal(model.get_parameter(key), tensor) for key, tensor in saved.items())
