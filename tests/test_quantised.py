"""Tuned blocks of a quantised base: float, trained, saved, beside blocks that stay packed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.config import KEEP_BASE
from surgical_peft.layer import SurgicalLayer
from surgical_peft.quantised import in_float

LIBRARY = {"4 bits": "bitsandbytes", "8 bits": "bitsandbytes", "torchao": "torchao"}


def quantisation(kind: str) -> Any:
    if kind == "4 bits":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    if kind == "8 bits":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=3, vocab_size=24
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def usual_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights stay in their usual order also on CPUs with bfloat16 arithmetic.

    There bitsandbytes 0.50 reorders them in the first forward pass in eval mode, and a `state_dict` after it leaves
    the scales in the wrong places: without any of our code the model then answers otherwise.
    """
    if importlib.util.find_spec("bitsandbytes") is not None:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(params=list(LIBRARY))
def kind(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(LIBRARY[request.param]) is None:
        pytest.skip(f"{LIBRARY[request.param]} is not installed")
    return request.param


def load(folder: Path, kind: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation(kind), device_map="cpu", dtype=torch.float32
    ).eval()


TOKENS = torch.randint(3, 24, (4, 6), generator=torch.Generator().manual_seed(0))


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_tuned_blocks_are_float_and_the_others_stay_packed(
    folder: Path, kind: str, keep_base: str, tmp_path: Path
) -> None:
    base = load(folder, kind)
    before = answer(base)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1], keep_base=keep_base)).eval()
    # 8-bit layers quantise their input too, which float ones do not
    torch.testing.assert_close(answer(model), before, rtol=0.05, atol=0.05)
    layer = next(module for module in model.modules() if isinstance(module, SurgicalLayer))
    own = dict(layer.module_in_use().named_parameters())
    assert {p.dtype for p in own.values()} == {torch.float32} and all(p.requires_grad for p in own.values())
    assert {type(module) for module in layer.module_in_use().modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    packed = base.model.layers[0].mlp.up_proj
    assert kind == "torchao" or type(packed) is not nn.Linear
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in own.values())
    optimizer.step()
    tuned = answer(model)
    assert not torch.equal(tuned, before)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(load(folder, kind), tmp_path).eval()
    assert torch.equal(answer(loaded), tuned)
    if keep_base != "none":
        with model.disable_adapter():
            assert torch.equal(answer(model), before)
    merged = model.merge_and_unload()
    assert torch.equal(answer(merged), tuned)


def test_four_bit_weights_in_another_order_are_refused(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = load(folder, "4 bits")
    base.model.layers[-1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(SurgicalError, match=r"mlp\.up_proj has 4-bit weights that a forward pass"):
        get_peft_model(base, SurgicalConfig(blocks=[-1]))


def test_float_modules_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert in_float(module) is module and type(module[0]) is nn.Linear
    weight = module[0].weight
    assert in_float(module)[0].weight is weight


class Packed(nn.Linear):
    """Stands for a quantised layer that torchao made: its weight says so by its class's module."""

    def __init__(self) -> None:
        super().__init__(3, 2, dtype=torch.bfloat16)
        self.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)


def test_weights_that_cannot_be_dequantised_are_named() -> None:
    with pytest.raises(SurgicalError, match=r"0\.weight is packed .* choose other blocks"):
        in_float(nn.Sequential(Packed(), nn.LayerNorm(3)))


def test_complex_weights_are_no_packed_ones() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6)

    model = get_peft_model(nn.Sequential(Filter(), nn.Linear(6, 2)), SurgicalConfig(target_modules=["0"]))
    model(torch.randn(3, 6)).sum().backward()
    assert [p.grad is not None and p.is_complex() for p in model.parameters() if p.requires_grad] == [True]
