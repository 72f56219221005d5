"""LoRA in other blocks, as a part of the same adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError, create_surgical_optimizer, score_blocks
from surgical_peft.blocks.unwrap import bare_parameter_name
from tests.support.toys import TOYS, Toy

TARGETS = {"vit": "q_proj", "bert": "query", "llama": "q_proj", "gpt2": "c_attn", "t5": "q", "qwen3_moe": "q_proj"}


def config(toy: Toy, **lora: Any) -> SurgicalConfig:
    arguments = {"r": 2, "target_modules": [TARGETS[toy.name]], **lora}
    return SurgicalConfig(blocks=[toy.last], lora=arguments)


def answer(model: nn.Module, toy: Toy) -> Tensor:
    with torch.no_grad():
        return model.eval()(**toy.batch()).logits


def trained(model: PeftModel, toy: Toy) -> PeftModel:
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2)
    for seed in range(3):
        model(**toy.batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_lora_is_everywhere_but_in_the_tuned_block(toy: Toy) -> None:
    model = get_peft_model(toy.model(), config(toy))
    blocks = BlockMap.find(toy.model())
    kinds = {"full": set(), "lora": set()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds["lora" if ".lora_" in name else "full"].add(blocks.block_of(bare_parameter_name(name)))
    layers = {block for stack in blocks.stacks.values() for block in stack}
    assert kinds == {"full": {toy.last}, "lora": layers - {toy.last}}
    assert torch.equal(answer(model, toy), answer(toy.model(), toy))


def test_both_are_trained_saved_and_loaded_as_one(toy: Toy, tmp_path: Path) -> None:
    model = trained(get_peft_model(toy.model(), config(toy)), toy)
    expected = answer(model, toy)
    assert not torch.equal(expected, answer(toy.model(), toy))
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any("lora_A.weight" in key for key in keys) and not any("default" in key for key in keys)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora"] == {
        "r": 2,
        "target_modules": [TARGETS[toy.name]],
    }
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path, adapter_name="other")
    assert torch.equal(answer(loaded, toy), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = PeftModel.from_pretrained(toy.model(), tmp_path, is_trainable=True)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_both_are_disabled_merged_and_unloaded_together(toy: Toy) -> None:
    model = trained(get_peft_model(toy.model(), config(toy)), toy)
    expected, base = answer(model, toy), answer(toy.model(), toy)
    with model.disable_adapter():
        assert torch.equal(answer(model, toy), base)
    model.merge_adapter()
    torch.testing.assert_close(answer(model, toy), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert list(merged.state_dict()) == list(toy.model().state_dict())
    torch.testing.assert_close(answer(merged, toy), expected, rtol=1e-4, atol=1e-4)


def test_adapters_with_and_without_lora_switch(vit: Toy) -> None:
    model = trained(get_peft_model(vit.model(), config(vit)), vit)
    with_lora, base = answer(model, vit), answer(vit.model(), vit)
    model.add_adapter("plain", SurgicalConfig(blocks=[vit.last]))
    model.add_adapter("second", config(vit, target_modules=["v_proj"], r=4))
    assert torch.equal(answer(model, vit), with_lora)
    for name, targets in (("plain", set()), ("second", {"v_proj"}), ("default", {"q_proj"})):
        model.set_adapter(name)
        lora = {n.split(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        assert lora & {"q_proj", "v_proj"} >= targets
        assert torch.equal(answer(model, vit), with_lora if name == "default" else base)
        assert {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n and name not in n} == set()
    model.delete_adapter("default")
    assert not any(".lora_" in n and "default" in n for n, _ in model.named_parameters())
    assert torch.equal(answer(model, vit), base)


def test_a_refused_merge_leaves_lora_unmerged(vit: Toy) -> None:
    model = trained(get_peft_model(vit.model(), config(vit)), vit)
    expected = answer(model, vit)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n)[0] = torch.nan
    with pytest.raises(SurgicalError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer))
    assert not torch.equal(answer(model, vit), expected)  # the NaN is still there


def test_a_config_object_and_a_dictionary_say_the_same() -> None:
    given = LoraConfig(r=4, target_modules={"q_proj", "v_proj"}, lora_alpha=16)
    assert SurgicalConfig(blocks=[0], lora=given).lora == {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "lora_alpha": 16,
    }
    with pytest.raises(SurgicalError, match="modules_to_save of SurgicalConfig itself"):
        SurgicalConfig(blocks=[0], lora=LoraConfig(modules_to_save=["classifier"]))


def test_a_lora_that_would_be_nowhere_is_refused_before_anything_changes() -> None:
    toy = TOYS["vit"]
    model = toy.model()
    with pytest.raises(SurgicalError, match=r"lora: target_modules=\['nobody'\]"):
        get_peft_model(model, config(toy, target_modules=["nobody"]))
    assert [type(module) for module in model.modules()] == [type(module) for module in toy.model().modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_lora_dropout_drops_in_train_mode(vit: Toy) -> None:
    model = get_peft_model(vit.model(), config(vit, lora_dropout=0.5)).train()
    dropouts = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    assert dropouts and all(module.training for module in dropouts)
    model.set_adapter("default")
    assert all(module.training for module in dropouts)
    assert not any(module.training for module in model.eval().modules())


@pytest.mark.parametrize("keep_base", ["device", "none"])
def test_transformers_own_load_adapter_finds_lora_too(toy: Toy, keep_base: str, tmp_path: Path) -> None:
    chosen = config(toy)
    chosen.keep_base = keep_base
    model = trained(get_peft_model(toy.model(), chosen), toy)
    model.save_pretrained(tmp_path)
    loaded = toy.model()
    loaded.load_adapter(tmp_path, adapter_name="other")
    assert torch.equal(answer(loaded, toy), answer(model, toy))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_refused_second_merge_keeps_the_first(vit: Toy) -> None:
    model = trained(get_peft_model(vit.model(), config(vit)), vit)
    model.add_adapter("second", config(vit))
    model.set_adapter("second")
    trained(model, vit)
    model.merge_adapter(["second"])
    merged = answer(model, vit)
    with pytest.raises(SurgicalError, match="same block"):
        model.merge_adapter(["default"])
    assert all(layer.merged_adapters == ["second"] for layer in model.modules() if isinstance(layer, LoraLayer))
    torch.testing.assert_close(answer(model, vit), merged, rtol=1e-4, atol=1e-4)


def test_scores_leave_out_the_lora_of_adapters_not_in_use() -> None:
    llama = TOYS["llama"]
    model = trained(get_peft_model(llama.model(), config(llama)), llama)
    alone = score_blocks(model, [llama.batch()]).values
    model.add_adapter("second", config(llama, r=4))
    assert score_blocks(model, [llama.batch()]).values == alone


def test_scores_of_a_merged_adapter_are_those_of_the_weights_in_use() -> None:
    llama = TOYS["llama"]
    model = trained(get_peft_model(llama.model(), config(llama)), llama)
    model.add_adapter("second", config(llama))
    expected = score_blocks(copy.deepcopy(model).merge_and_unload(), [llama.batch()]).values
    model.set_adapter("second")
    model.merge_adapter(["default"])  # which answers now, though the other one is active
    assert score_blocks(model, [llama.batch()]).values == pytest.approx(expected, rel=1e-4)


def _without(tensors: dict[str, Tensor], part: str, count: int | None) -> dict[str, Tensor]:
    gone = [key for key in tensors if part in key][:count]
    return {key: tensor for key, tensor in tensors.items() if key not in gone}


def _damaged(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(key for key in tensors if ".lora_A" in key)
    match kind:
        case "one missing":
            return _without(tensors, ".lora_B", 1)
        case "all missing":
            return _without(tensors, ".lora_", None)
        case "one too many":
            return {**tensors, first.replace("lora_A", "lora_C"): tensors[first].clone()}
        case "of another module":
            return {key.replace("lora_A", "lora_a") if key == first else key: value for key, value in tensors.items()}
    return {**tensors, first: torch.cat([tensors[first], tensors[first]])}


@pytest.mark.parametrize("kind", ["one missing", "all missing", "one too many", "of another module", "another rank"])
def test_a_damaged_lora_part_is_refused_before_the_model_is_touched(kind: str, toy: Toy, tmp_path: Path) -> None:
    """What was missing kept random values, without a word; a wrong rank was noticed in a model half wrapped."""
    trained(get_peft_model(toy.model(), config(toy)), toy).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(_damaged(kind, load_file(weights)), weights)
    model = toy.model()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(SurgicalError, match=r"(?i)lora"):
        PeftModel.from_pretrained(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"target_modules": "all-linear"}],
    ids=lambda lora: next(iter(lora)),
)
def test_every_kind_of_lora_passes_the_check(lora: dict[str, Any], tmp_path: Path) -> None:
    toy = TOYS["llama"]
    model = trained(get_peft_model(toy.model(), config(toy, **lora)), toy)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path)
    loaded.load_adapter(tmp_path, "second")
    if lora.get("init_lora_weights") != "pissa":  # which changes the base, and PEFT converts when it saves
        assert torch.allclose(answer(loaded, toy), answer(model, toy), atol=1e-6)


def test_a_lora_that_peft_cannot_make_leaves_the_model_as_it_was() -> None:
    """PEFT said so when the blocks were wrapped already."""
    toy = TOYS["bert"]
    model = toy.model()
    before = list(model.state_dict())
    with pytest.raises(SurgicalError, match="LayerNorm"):
        get_peft_model(model, SurgicalConfig(blocks=["head"], lora={"target_modules": ["LayerNorm"]}))
    assert list(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
