"""Where the original weights stay: how much memory that takes, and what can be gone back to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.tuner.config import KEEP_BASE
from surgical_peft.tuner.tensors.slots import BASE
from tests.support.toys import Toy
from tests.support.wrapping import layers, logits, nudge

META = torch.device("meta")  # stands for an accelerator: what is on it takes none of the CPU's memory


def wrap(toy: Toy, keep_base: str, blocks: object = None) -> PeftModel:
    config = SurgicalConfig(blocks=blocks or [toy.first, toy.last], keep_base=keep_base)
    return get_peft_model(toy.model(), config)


def resident(model: nn.Module, device: str = "cpu") -> int:
    """Bytes of the model's own storages, each once."""
    tensors = model.state_dict(keep_vars=True).values()
    buffers = [buffer for module in model.modules() for buffer in module._buffers.values() if buffer is not None]
    sizes = {
        (t.untyped_storage().data_ptr() or id(t)): t.untyped_storage().nbytes()
        for t in [*tensors, *buffers]
        if t.device.type == device
    }
    return sum(sizes.values())


def test_none_holds_no_second_copy(toy: Toy) -> None:
    assert resident(wrap(toy, "none")) == resident(toy.model())
    model = wrap(toy, "device")
    tuned = sum(tensor.nbytes for layer in layers(model) for tensor in layer.tensors("default").values())
    assert resident(model) == resident(toy.model()) + tuned


def test_cpu_holds_nothing_more_on_the_accelerator(toy: Toy) -> None:
    plain, model = toy.model(), wrap(toy, "cpu")
    before = [tensor.clone() for tensor in parked(model)]
    model.to(META)
    assert resident(model, "meta") == resident(plain.to(META), "meta")
    assert before and all(torch.equal(*both) for both in zip(before, parked(model), strict=True))


def parked(model: nn.Module) -> list[Tensor]:
    """The base's tensors, where they are kept."""
    return [slot.parked[BASE] for layer in layers(model) for slot in layer.slots.values()]


def test_what_is_parked_is_lent_while_it_is_asked_for(vit: Toy) -> None:
    model = wrap(vit, "cpu").to(META)
    images = torch.empty(2, 3, 8, 8, device=META)
    with model.disable_adapter():
        assert model(images).logits.device == META
        assert {p.device for p in model.base_model.model.parameters()} == {META}
        assert {tensor.device.type for tensor in parked(model)} == {"cpu"}
    assert model(images).logits.device == META
    assert {tensor.device.type for tensor in parked(model)} == {"cpu"}
    model.add_adapter("other", SurgicalConfig(blocks=[vit.first], keep_base="cpu"))
    assert {t.device.type for layer in layers(model) for t in layer.tensors("other").values()} == {"meta"}


def test_a_parked_original_takes_the_dtype_that_the_model_is_given(vit: Toy) -> None:
    model = wrap(vit, "cpu").to(torch.bfloat16)
    assert {tensor.dtype for tensor in parked(model)} == {torch.bfloat16}
    with model.disable_adapter():
        expected = vit.model().to(torch.bfloat16)(vit.batch()["pixel_values"].bfloat16()).logits
        assert torch.equal(model(vit.batch()["pixel_values"].bfloat16()).logits, expected)


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_the_base_is_counted_once(toy: Toy, keep_base: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = sum(parameter.numel() for parameter in toy.model().parameters())
    model = wrap(toy, keep_base)
    trained, everything = model.get_nb_trainable_parameters()
    assert everything == base
    assert trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.print_trainable_parameters()
    assert f"all params: {base:,}" in capsys.readouterr().out
    assert len({id(p) for p in model.parameters()}) == len(list(toy.model().parameters()))


@pytest.mark.parametrize("keep_base", KEEP_BASE)
def test_all_ways_train_save_and_merge_alike(toy: Toy, keep_base: str, tmp_path: Path) -> None:
    def trained(way: str) -> PeftModel:
        model = wrap(toy, way)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for seed in (0, 1):
            model(**toy.batch(seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    model, reference = trained(keep_base), trained("device")
    assert torch.equal(logits(model, toy.batch()), logits(reference, toy.batch()))
    model.save_pretrained(tmp_path / "a")
    reference.save_pretrained(tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path / "a", adapter_name="other").eval()
    assert loaded.peft_config["other"].keep_base == keep_base
    assert torch.equal(logits(loaded, toy.batch()), logits(reference, toy.batch()))
    merged = model.merge_and_unload()
    assert type(merged) is type(toy.model())
    assert list(merged.state_dict()) == list(toy.model().state_dict())
    assert torch.equal(logits(merged, toy.batch()), logits(reference, toy.batch()))


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
def test_a_kept_base_can_be_gone_back_to(toy: Toy, keep_base: str) -> None:
    base, model = toy.model(), wrap(toy, keep_base)
    nudge(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, toy.batch()), logits(base, toy.batch()))
    model.add_adapter("other", SurgicalConfig(blocks=[toy.first], keep_base=keep_base))
    model.set_adapter("other")
    assert torch.equal(logits(model, toy.batch()), logits(base, toy.batch()))
    model.delete_adapter("default")
    assert torch.equal(logits(model.unload(), toy.batch()), logits(base, toy.batch()))


REFUSED: dict[str, Callable[[PeftModel], object]] = {
    "disable": lambda model: model.disable_adapter().__enter__(),
    "disable_layers": lambda model: model.base_model.disable_adapter_layers(),
    "unload": lambda model: model.unload(),
    "delete": lambda model: model.delete_adapter("default"),
    "second": lambda model: model.add_adapter("other", SurgicalConfig(blocks=["1"])),
    "second, in place": lambda model: model.add_adapter("other", SurgicalConfig(blocks=["1"], keep_base="none")),
    "base rows": lambda model: model(torch.zeros(2, 3, 8, 8), adapter_names=["default", "__base__"]),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_without_a_base_there_is_nothing_to_go_back_to(vit: Toy, what: str) -> None:
    model = wrap(vit, "none")
    nudge(model)
    model.eval()
    before, trainable = logits(model, vit.batch()), [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(SurgicalError, match="keep_base="):
        REFUSED[what](model)
    assert torch.equal(logits(model, vit.batch()), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert list(model.peft_config) == ["default"]


def test_merging_and_unmerging_in_place_changes_nothing(vit: Toy) -> None:
    model = wrap(vit, "none")
    nudge(model)
    before = logits(model, vit.batch())
    model.merge_adapter()
    assert torch.equal(logits(model, vit.batch()), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model, vit.batch()), before)


def test_adapters_on_one_block_share_its_base(vit: Toy) -> None:
    model = wrap(vit, "cpu")
    with pytest.raises(SurgicalError, match=r"keep_base='device': vit.layers.0\..*another adapter"):
        model.add_adapter("other", SurgicalConfig(blocks=["0"]))
    model.add_adapter("elsewhere", SurgicalConfig(blocks=["1"]))
    with pytest.raises(SurgicalError, match=r"'gpu'.*device, cpu, none"):
        SurgicalConfig(blocks=[0], keep_base="gpu")


def test_an_adapter_trained_in_place_can_be_loaded_beside_the_base(vit: Toy, tmp_path: Path) -> None:
    model = wrap(vit, "none")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    model.save_pretrained(tmp_path)
    with pytest.raises(SurgicalError, match="size"):  # still looked at first
        small = ViTForImageClassification(ViTConfig(**{**vit.model().config.to_dict(), "intermediate_size": 16}))
        PeftModel.from_pretrained(small, tmp_path, keep_base="cpu")
    loaded = PeftModel.from_pretrained(vit.model(), tmp_path, keep_base="cpu").eval()  # as the refusal says
    assert torch.equal(loaded(**vit.batch()).logits, model.eval()(**vit.batch()).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(**vit.batch()).logits, vit.model()(**vit.batch()).logits)


def test_zero_3_refuses_originals_on_the_cpu(monkeypatch: pytest.MonkeyPatch, vit: Toy) -> None:
    """DeepSpeed moves its weights itself; tests/trainers/test_deepspeed.py runs the other two."""
    monkeypatch.setattr("surgical_peft.tuner.target_modules.is_deepspeed_zero3_enabled", lambda: True)
    model = vit.model()
    before = repr(model)
    with pytest.raises(SurgicalError, match=r"keep_base='cpu' under DeepSpeed's ZeRO-3.*offload_param"):
        get_peft_model(model, SurgicalConfig(blocks=[0], keep_base="cpu"))
    assert repr(model) == before


def test_the_base_comes_back_to_the_accelerator_also_after_its_first_adapter_was_deleted(vit: Toy) -> None:
    """The model's own objects are the base's then, and wait on the CPU."""
    model = wrap(vit, "cpu").to(META)
    model.add_adapter("other", SurgicalConfig(blocks=[vit.first], keep_base="cpu"))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert {tensor.device.type for tensor in parked(model)} == {"cpu"}
    assert {parameter.device for parameter in model.unload().parameters()} == {META}
