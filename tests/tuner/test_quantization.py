"""Tuned blocks of a quantized base: float, trained, saved, beside blocks that stay packed."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.tuner.config import KEEP_BASE
from surgical_peft.tuner.quantization import FloatLinear, is_packed, note_float_layers, packed_layers

LIBRARY = {"4 bits": "bitsandbytes", "8 bits": "bitsandbytes", "torchao": "torchao"}


def quantization(kind: str) -> Any:
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


def field_of(kind: str) -> str:
    return "modules_to_not_convert" if kind == "torchao" else "llm_int8_skip_modules"


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization(kind), device_map="cpu", dtype=dtype
    ).eval()


TOKENS = torch.randint(3, 24, (4, 6), generator=torch.Generator().manual_seed(0))


def answer(model: nn.Module, **keywords: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, **keywords).logits


def train(model: nn.Module) -> torch.Tensor:
    """Move what is trained; the model's answer after it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    return answer(model)


def linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def packed(model: nn.Module) -> set[str]:
    return {path for path, module in linear(model).items() if is_packed(module.weight)}


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_tuned_blocks_are_float_and_the_others_stay_packed(
    folder: Path, kind: str, keep_base: str, tmp_path: Path
) -> None:
    base = load(folder, kind)
    before, all_packed = answer(base), packed(base)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1], keep_base=keep_base)).eval()
    # 8-bit layers quantize their input too, which float ones do not
    torch.testing.assert_close(answer(model), before, rtol=0.05, atol=0.05)
    own = dict(base.model.layers[-1].named_parameters())
    assert {p.dtype for p in own.values()} == {torch.float32} and all(p.requires_grad for p in own.values())
    assert packed(base) == {path for path in all_packed if "layers.2" not in path}
    assert len(packed(base)) == 14
    tuned = train(model)
    assert all(p.grad is not None and p.grad.any() for p in own.values())
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


def test_a_saved_adapter_is_loaded_with_low_cpu_mem_usage(folder: Path, kind: str, tmp_path: Path) -> None:
    model = get_peft_model(load(folder, kind), SurgicalConfig(blocks=[-1])).eval()
    tuned = train(model)
    model.save_pretrained(tmp_path)
    base = load(folder, kind)
    before = answer(base)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(answer(loaded), tuned)
    with loaded.disable_adapter():
        assert torch.equal(answer(loaded), before)


@pytest.mark.parametrize("blocks", [[-1], "all"])
def test_a_merged_model_is_saved_and_loaded(folder: Path, kind: str, blocks: Any, tmp_path: Path) -> None:
    model = get_peft_model(load(folder, kind), SurgicalConfig(blocks=blocks)).eval()
    tuned = train(model)
    merged = model.merge_and_unload()
    in_float = {path for path in linear(merged) if blocks == "all" or "layers.2" in path or path == "lm_head"}
    assert packed(merged) == linear(merged).keys() - in_float
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu").eval()
    assert torch.equal(answer(loaded), tuned) and torch.equal(answer(merged), tuned)
    assert packed(loaded) == packed(merged)
    assert {type(linear(loaded)[path]) for path in in_float} == {nn.Linear}
    # and once more, on what was read; transformers (5.23) cannot save a quantized model that was read from a file
    again = get_peft_model(loaded, SurgicalConfig(blocks=[0])).eval()
    torch.testing.assert_close(answer(again), tuned, rtol=0.05, atol=0.05)
    again = again.merge_and_unload()
    assert packed(again) == {path for path in packed(merged) if "layers.0" not in path}
    noted = again.config.quantization_config.to_dict()[field_of(kind)]
    assert {path for path in linear(again) if path in noted} == linear(again).keys() - packed(again)


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
def test_adapters_take_turns_on_a_quantized_block(folder: Path, kind: str, keep_base: str) -> None:
    base = load(folder, kind)
    before, layers = answer(base), linear(base)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1], keep_base=keep_base), "first").eval()
    answers = {"first": train(model)}
    model.add_adapter("second", SurgicalConfig(blocks=[1, 2], keep_base=keep_base))
    model.set_adapter("second")
    torch.testing.assert_close(answer(model), before, rtol=0.05, atol=0.05)
    answers["second"] = train(model)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(answer(model), answers[name])
        with model.disable_adapter():
            assert torch.equal(answer(model), before)
        assert torch.equal(answer(model), answers[name])
    by_rows = answer(model, adapter_names=["first", "second", "__base__", "first"], use_cache=False)
    for row, logits in enumerate((answers["first"], answers["second"], before, answers["first"])):
        # 8-bit layers look at the whole batch for its outliers
        torch.testing.assert_close(by_rows[row], logits[row], rtol=1e-2, atol=1e-2)
    assert torch.equal(answer(model), answers["first"])
    model.merge_adapter(["second"])
    assert torch.equal(answer(model), answers["second"])
    model.unmerge_adapter()
    twin = copy.deepcopy(model)
    model.set_adapter("second")
    model.delete_adapter("first")
    assert torch.equal(answer(model), answers["second"])
    model.delete_adapter("second")
    assert torch.equal(answer(base), before)  # PEFT's own model cannot be called without an adapter
    assert all(module is layers[path] for path, module in linear(base).items())
    model.add_adapter("third", SurgicalConfig(blocks=[-1], keep_base=keep_base))
    model.set_adapter("third")
    torch.testing.assert_close(answer(model), before, rtol=0.05, atol=0.05)
    train(model)
    bare = model.unload()
    assert torch.equal(answer(bare), before)
    assert all(module is layers[path] for path, module in linear(bare).items())
    # the copy has all of it to itself
    twin.set_adapter("second")
    assert torch.equal(answer(twin), answers["second"])
    with twin.disable_adapter():
        assert torch.equal(answer(twin), before)
    assert torch.equal(answer(twin.merge_and_unload()), answers["second"])


def test_an_adapter_follows_one_that_was_deleted_beside_another(folder: Path, kind: str) -> None:
    base = load(folder, kind)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1]), "first").eval()
    fresh = answer(model)
    train(model)
    model.add_adapter("second", SurgicalConfig(blocks=[-1]))
    model.delete_adapter("first")
    model.add_adapter("third", SurgicalConfig(blocks=[-1]))
    model.set_adapter("third")
    assert torch.equal(answer(model), fresh)


@pytest.mark.parametrize("active", [True, False])
def test_a_wrapped_quantized_model_is_moved(folder: Path, kind: str, active: bool) -> None:
    base = load(folder, kind)
    before = answer(base)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1])).eval()
    tuned = train(model)
    if not active:
        model.disable_adapter_layers()
    model.to("cpu")
    assert torch.equal(answer(model), tuned if active else before)


@pytest.mark.parametrize("modules", ["all-norm", "all-bias"])
def test_norms_and_biases_leave_linear_layers_packed(folder: Path, kind: str, modules: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=24, attention_bias=True, mlp_bias=True)).save_pretrained(tmp_path)
    base = load(tmp_path, kind)
    before, layers = answer(base), linear(base)
    record = copy.deepcopy(base.config.quantization_config.to_dict())
    model = get_peft_model(base, SurgicalConfig(blocks="all", target_modules=modules)).eval()
    assert all(module is layers[path] for path, module in linear(base).items())
    assert torch.equal(answer(model), before)
    tuned = train(model)
    assert not torch.equal(tuned, before)
    with model.disable_adapter():
        assert torch.equal(answer(model), before)
    merged = model.merge_and_unload()
    assert torch.equal(answer(merged), tuned)
    assert merged.config.quantization_config.to_dict() == record  # nothing has become float
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").eval()
    assert torch.equal(answer(loaded), tuned)


@pytest.mark.parametrize("target_modules", [None, ["up_proj"]])
def test_float_weights_have_the_dtype_of_the_activations(folder: Path, kind: str, target_modules: Any) -> None:
    base = load(folder, kind, torch.bfloat16)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1], target_modules=target_modules)).eval()
    train(model)
    assert base.model.layers[-1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_hooks_and_mode_of_a_packed_layer_go_with_it(folder: Path, kind: str) -> None:
    base = load(folder, kind)
    seen: list[str] = []
    layer = base.model.layers[-1].mlp.up_proj
    handle = layer.register_forward_hook(lambda *_, **__: seen.append("hook"), with_kwargs=True)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1])).eval()
    answer(model)
    model.train()
    assert layer.training
    with model.eval().disable_adapter():
        answer(model)
    merged = model.merge_and_unload()
    answer(merged)
    assert seen == ["hook"] * 3
    handle.remove()
    answer(merged)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_gpt2_keeps_its_turned_weights(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=2, n_layer=2, vocab_size=24, n_positions=16)).save_pretrained(
        tmp_path
    )
    base = load(tmp_path, kind)
    before = answer(base)
    model = get_peft_model(base, SurgicalConfig(blocks=[-1])).eval()
    torch.testing.assert_close(answer(model), before, rtol=0.05, atol=0.05)
    tuned = train(model)
    model.save_pretrained(tmp_path / "adapter")
    plain = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert tensor.shape == shapes[name.removeprefix("base_model.model.")]
    with pytest.warns(UserWarning, match="base"):  # another one, but near it
        near = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(answer(near), tuned, rtol=0.05, atol=0.05)
    merged = model.merge_and_unload()
    assert type(merged.transformer.h[-1].mlp.c_fc) is Conv1D
    assert torch.equal(answer(merged), tuned)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").eval()
    assert type(loaded.transformer.h[-1].mlp.c_fc) is Conv1D
    assert torch.equal(answer(loaded), tuned)


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_in_another_order_are_read_rightly(double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compress_statistics=double, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(64, 128)})
    layer = layer.to("cpu").eval()
    usual = FloatLinear(layer, torch.float32).weight
    state = layer.weight.quant_state
    layer.weight.data, layer.weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
        layer.weight.data, state
    )
    assert state.packing_format_for_cpu
    turned = FloatLinear(layer, torch.float32).weight
    torch.testing.assert_close(turned, usual, rtol=0.01, atol=0.01)  # it has rounded the scales to bfloat16
    assert state.packing_format_for_cpu and state.dtype == torch.bfloat16  # as it was


def test_the_record_of_float_layers(folder: Path, kind: str) -> None:
    def merged(record: Any = None) -> Any:
        base = load(folder, kind)
        if record is not None:
            base.config.quantization_config = record
        return get_peft_model(base, SurgicalConfig(blocks=[-1], keep_base="none")).merge_and_unload()

    field = field_of(kind)
    method = LIBRARY[kind]
    paths = [path for path in linear(load(folder, kind)) if "layers.2" in path]
    assert getattr(merged().config.quantization_config, field) == [*paths, "lm_head"]
    # names that are there stay, also of what is no linear layer
    known = ["lm_head", "experts", "model.layers.2.mlp"]
    record = merged({"quant_method": method, field: known}).config.quantization_config
    assert record[field] == [*known, *[path for path in paths if "self_attn" in path]]
    with pytest.warns(UserWarning, match=r"\(dict\).*model\.layers\.2"):
        model = merged({"quant_method": "another"})
    assert model.config.quantization_config == {"quant_method": "another"}
    answer(model)
    unwrapped = get_peft_model(load(folder, kind), SurgicalConfig(blocks=[-1])).unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note_float_layers(unwrapped)
    assert getattr(unwrapped.config.quantization_config, field) is None


def test_a_float_layer_whose_name_ends_that_of_a_packed_one_is_named_alone(folder: Path, kind: str) -> None:
    base = load(folder, kind)
    base.proj = base.model.layers[0].mlp.up_proj  # names that end so are those of other layers
    base.out_proj = base.model.layers[1].mlp.up_proj
    base.model.layers[0].mlp.up_proj = nn.Identity()
    base.proj = FloatLinear(base.proj, torch.float32).plain()
    note_float_layers(base)
    field = field_of(kind)
    assert getattr(base.config.quantization_config, field) == ["lm_head", r"proj(?=\.|$)"]


def test_float_modules_stay_as_they_are() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert packed_layers(module, [""], ["0.weight", "0.bias", "1.weight"]) == {}
    weight = module[0].weight
    model = get_peft_model(module, SurgicalConfig(target_modules=["0"]))
    assert type(module[0]) is nn.Linear and module[0].weight is weight
    assert model.merge_and_unload()[0].weight is weight


class Packed(nn.Linear):
    """Stands for a quantized layer whose weight nobody can turn back."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(3, 2, dtype=torch.bfloat16)
        self.weight = nn.Parameter(torch.zeros(2, 3).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_weights_that_cannot_be_dequantized_are_named(dtype: torch.dtype) -> None:
    module = nn.Sequential(Packed(dtype), nn.LayerNorm(2))
    with pytest.raises(SurgicalError, match=r"0\.weight is packed"):
        get_peft_model(module, SurgicalConfig(target_modules=["0"]))
    get_peft_model(module, SurgicalConfig(target_modules=["1"]))


class Table(nn.Module):
    """A layer with numbers of places, as a parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(3).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.bool])
def test_integers_that_are_no_packed_weights_are_told_as_such(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Sequential(Table(dtype), nn.LayerNorm(2)))
    with pytest.raises(SurgicalError, match=rf"0\.0\.places .*{dtype}.*exclude_modules=\['0\.0'\]"):
        get_peft_model(module, SurgicalConfig(target_modules=["0"]))
    model = get_peft_model(module, SurgicalConfig(target_modules=["0"], exclude_modules=["0.0"]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.0.1.weight",
        "base_model.model.0.1.bias",
    }


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
