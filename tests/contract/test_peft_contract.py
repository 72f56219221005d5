"""What PEFT promises for every method, shown for ours on every toy."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_base_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError
from surgical_peft.layer import SurgicalLayer

from ..families import FAMILIES
from ..toys import TOYS, Batch, Toy

AUTO_CLASSES = {
    **dict.fromkeys(("vit", "swin", "convnext", "resnet"), transformers.AutoModelForImageClassification),
    **dict.fromkeys(("bert", "modernbert", "albert"), transformers.AutoModelForSequenceClassification),
    "t5": transformers.AutoModelForSeq2SeqLM,
    "clip": transformers.AutoModel,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
}


def wrap(toy: Toy, blocks: list[str] | None = None, **kwargs: Any) -> PeftModel:
    return get_peft_model(toy.model(), SurgicalConfig(blocks=blocks or [toy.first, toy.last], **kwargs))


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output.logits_per_image if "logits_per_image" in output else output.logits


def same(mine: Tensor, theirs: Tensor) -> bool:
    """Equal, but for the last bit: Mamba's scan depends on where its activations lie in memory."""
    return torch.equal(mine, theirs) or torch.allclose(mine, theirs, rtol=1e-6, atol=1e-6)


def nudge(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change everything trainable, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def module_paths(model: nn.Module, *blocks: str) -> list[str]:
    found = BlockMap.find(model)
    return [path for block in blocks for path in found.modules[block]]


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 reads a property that transformers 5.23 has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield


@dataclass(frozen=True)
class Saved:
    """A tuned adapter on disk, with its base model, and what both should answer."""

    toy: Toy
    base: Path
    adapter: Path
    base_logits: Tensor
    tuned_logits: Tensor


@pytest.fixture(params=list(FAMILIES))
def toy(request: pytest.FixtureRequest) -> Toy:
    """Every family in turn: what PEFT promises is promised for all."""
    return FAMILIES[request.param]


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    toy = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(toy.name)
    toy.model().save_pretrained(directory / "base")
    base = type(toy.model()).from_pretrained(directory / "base")
    base_logits = logits(base, toy.batch())
    model = get_peft_model(base, SurgicalConfig(blocks=[toy.first, toy.last]))
    tuned_logits = logits(nudge(model), toy.batch())
    assert not torch.allclose(base_logits, tuned_logits)
    with no_warnings():
        model.save_pretrained(directory / "adapter")
    return Saved(toy, directory / "base", directory / "adapter", base_logits, tuned_logits)


# wrapping and training


def test_wrapping_changes_no_output(toy: Toy) -> None:
    assert same(logits(wrap(toy), toy.batch()), logits(toy.model(), toy.batch()))


def test_exactly_the_chosen_blocks_are_trainable(toy: Toy) -> None:
    base = toy.model()
    chosen = BlockMap.find(base).named_parameters(base)
    expected = {**chosen[toy.first], **chosen[toy.last]}

    model = wrap(toy)

    names = {
        name.removeprefix("base_model.model.").replace("surgical_copies.default.", "") for name in trainable(model)
    }
    assert names == set(expected)
    assert model.get_nb_trainable_parameters()[0] == sum(parameter.numel() for parameter in expected.values())


def test_a_step_trains_the_chosen_blocks_and_nothing_else(toy: Toy) -> None:
    model, batch = wrap(toy), toy.batch()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    output = logits(model, batch)
    full = toy.model()
    full(**batch).loss.backward()
    took_part = {name for name, parameter in full.named_parameters() if parameter.grad is not None}

    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()

    assert not same(logits(model, batch), output)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])
        elif name.removeprefix("base_model.model.").replace("surgical_copies.default.", "") in took_part:
            assert parameter.grad is not None


def test_gradients_are_those_of_the_bare_model(toy: Toy) -> None:
    model, full = wrap(toy), toy.model()
    model(**toy.batch()).loss.backward()
    full(**toy.batch()).loss.backward()
    grads = {name: parameter.grad for name, parameter in full.named_parameters()}
    for name in trainable(model):
        bare = name.removeprefix("base_model.model.").replace("surgical_copies.default.", "")
        torch.testing.assert_close(model.get_parameter(name).grad, grads[bare])


def test_hidden_states_are_as_many_as_before(toy: Toy) -> None:
    seen = [model(**toy.batch(), output_hidden_states=True) for model in (toy.model(), wrap(toy))]
    outputs = [output.vision_model_output if toy.name == "clip" else output for output in seen]
    key = next(key for key in ("hidden_states", "encoder_hidden_states") if key in outputs[0])
    states = [output[key] for output in outputs]
    assert len(states[0]) == len(states[1]) > 1
    assert same(states[0][-1], states[1][-1])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("albert", "convnext", "resnet")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, when: str) -> None:
    toy = FAMILIES[name]

    def grads(checkpointing: str | None) -> list[Tensor | None]:
        base = toy.model()
        if checkpointing == "before":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = get_peft_model(base, SurgicalConfig(blocks=[toy.first, toy.last]))
        if checkpointing == "after":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        model(**toy.batch()).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for plain, checkpointed in zip(grads(None), grads(when), strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_a_bfloat16_model_stays_bfloat16(toy: Toy, tmp_path: Path) -> None:
    model = get_peft_model(toy.model().bfloat16(), SurgicalConfig(blocks=[toy.first, toy.last]))
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in toy.batch().items()}
    model(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(toy.model().bfloat16(), tmp_path)

    assert {tensor.dtype for tensor in weights(tmp_path).values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in [*model.parameters(), *loaded.parameters()]} == {torch.bfloat16}
    assert same(logits(loaded, batch), logits(model, batch))


# the file


def test_the_file_is_the_one_that_stock_peft_would_write(toy: Toy, tmp_path: Path) -> None:
    ours = nudge(wrap(toy))
    paths = module_paths(toy.model(), toy.first, toy.last)
    stock = get_peft_model(toy.model(), LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=paths))
    for mine, theirs in zip(trainable(ours), trainable(stock), strict=True):
        stock.get_parameter(theirs).data.copy_(ours.get_parameter(mine))

    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")

    mine, theirs = weights(tmp_path / "ours"), weights(tmp_path / "stock")
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_saved_keys_are_the_names_of_the_base_model(saved: Saved) -> None:
    names = {f"base_model.model.{name}" for name in saved.toy.model().state_dict()}
    assert set(weights(saved.adapter)) <= names


def test_the_file_holds_little_more_than_the_tuned_weights(saved: Saved) -> None:
    tuned = sum(tensor.nbytes for tensor in weights(saved.adapter).values())
    assert (saved.adapter / "adapter_model.safetensors").stat().st_size <= 1.001 * tuned + 8_000


def test_the_base_models_state_dict_can_be_had(toy: Toy) -> None:
    base = toy.model().state_dict()
    seen = get_base_model_state_dict(nudge(wrap(toy)))
    assert list(seen) == list(base)
    assert all(torch.equal(seen[key], base[key]) for key in base)


# loading


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loads_under_another_name(saved: Saved, low_cpu_mem_usage: bool) -> None:
    with no_warnings():
        model = PeftModel.from_pretrained(
            saved.toy.model(), saved.adapter, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
        )
    assert same(logits(model, saved.toy.batch()), saved.tuned_logits)
    assert trainable(model) == []


# PEFT keeps adapters in an nn.ModuleDict: names with a dot, or of its own attributes ("keys"), fail for any method.
@pytest.mark.parametrize("name", ["attention", "layer", "0", "1", "11", "vit", "weight", "bias", "model", "mlp"])
def test_loads_under_a_name_that_parts_of_the_model_have(vit: Toy, tmp_path: Path, name: str) -> None:
    tuned = nudge(wrap(vit))
    tuned.save_pretrained(tmp_path)
    with no_warnings():
        model = PeftModel.from_pretrained(vit.model(), tmp_path, adapter_name=name)
    model.save_pretrained(tmp_path / "again", selected_adapters=[name])

    assert same(logits(model, vit.batch()), logits(tuned, vit.batch()))
    first, again = weights(tmp_path), weights(tmp_path / "again" / name)
    assert list(again) == list(first)
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_loads_trainable(saved: Saved) -> None:
    model = PeftModel.from_pretrained(saved.toy.model(), saved.adapter, is_trainable=True)
    assert trainable(model) == trainable(wrap(saved.toy))


def test_a_second_adapter_loads_without_a_missing_or_unexpected_key(saved: Saved) -> None:
    model = wrap(saved.toy, blocks=[saved.toy.last])
    before = trainable(model)
    with no_warnings():
        result = model.load_adapter(saved.adapter, adapter_name="second")
    assert result.missing_keys == result.unexpected_keys == []
    assert trainable(model) == before
    assert same(logits(model, saved.toy.batch()), saved.base_logits)

    model.set_adapter("second")
    assert same(logits(model, saved.toy.batch()), saved.tuned_logits)


def test_auto_model_loads_the_adapter_directory(saved: Saved) -> None:
    auto = AUTO_CLASSES.get(saved.toy.name, transformers.AutoModelForCausalLM)
    model = auto.from_pretrained(saved.adapter)
    assert same(logits(model, saved.toy.batch()), saved.tuned_logits)


def test_auto_peft_model_loads_the_adapter_directory(saved: Saved) -> None:
    model = AutoPeftModel.from_pretrained(saved.adapter)
    assert same(logits(model, saved.toy.batch()), saved.tuned_logits)


def test_transformers_loads_switches_and_disables_the_adapter(saved: Saved) -> None:
    base, batch = saved.toy.model(), saved.toy.batch()
    info = base.load_adapter(saved.adapter, adapter_name="other")
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    assert same(logits(base, batch), saved.tuned_logits)

    base.disable_adapters()
    assert same(logits(base, batch), saved.base_logits)
    base.enable_adapters()
    assert same(logits(base, batch), saved.tuned_logits)

    base.load_adapter(saved.adapter, adapter_name="again")
    base.set_adapter("again")
    assert base.active_adapters() == ["again"]
    assert same(logits(base, batch), saved.tuned_logits)
    base.set_adapter("other")
    assert same(logits(base, batch), saved.tuned_logits)

    base.delete_adapter(["again", "other"])
    assert same(logits(base, batch), saved.base_logits)


# With such a name transformers lists base weights as missing in its report, for any method; the model is right.
@pytest.mark.parametrize("name", ["attention", "0", "bias"])
def test_transformers_loads_under_a_name_that_parts_of_the_model_have(saved: Saved, name: str) -> None:
    base = saved.toy.model()
    base.load_adapter(saved.adapter, adapter_name=name)
    assert same(logits(base, saved.toy.batch()), saved.tuned_logits)


def test_transformers_adds_and_saves_the_adapter(toy: Toy, tmp_path: Path) -> None:
    base = toy.model()
    base.add_adapter(SurgicalConfig(blocks=[toy.first, toy.last]))
    nudge(base)
    base.save_pretrained(tmp_path)

    model = PeftModel.from_pretrained(toy.model(), tmp_path)

    assert same(logits(model, toy.batch()), logits(base, toy.batch()))


def test_low_cpu_mem_usage_keeps_the_dtype_of_the_base(tmp_path: Path) -> None:
    """The float32 file took the place of the copy as it was, and a bfloat16 model could not run with it."""
    llama = TOYS["llama"]
    nudge(wrap(llama)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama.model().bfloat16(), tmp_path, low_cpu_mem_usage=True)
    plain = PeftModel.from_pretrained(llama.model().bfloat16(), tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert same(logits(model, llama.batch()), logits(plain, llama.batch()))


def test_an_adapter_for_another_architecture_is_refused(tmp_path: Path) -> None:
    wrap(TOYS["bert"]).save_pretrained(tmp_path / "bert")
    wrap(TOYS["vit"]).save_pretrained(tmp_path / "vit")
    with pytest.raises(SurgicalError, match=r"which stack.*decoder\[0\]"):
        PeftModel.from_pretrained(TOYS["t5"].model(), tmp_path / "bert")
    with pytest.raises(SurgicalError, match="'11' does not exist: BertForSequenceClassification has 3"):
        PeftModel.from_pretrained(TOYS["bert"].model(), tmp_path / "vit")
    with pytest.raises(SurgicalError, match=r"does not fit ViTForImageClassification: it lacks .*vit\.layers\.0"):
        PeftModel.from_pretrained(TOYS["vit"].model(), tmp_path / "bert")


def test_an_adapter_of_other_shapes_is_refused(tmp_path: Path) -> None:
    bert = TOYS["bert"]
    wrap(bert).save_pretrained(tmp_path)
    config = copy.deepcopy(bert.model().config)
    config.intermediate_size *= 2
    with pytest.raises(SurgicalError, match="model of another size"):
        PeftModel.from_pretrained(type(bert.model())(config), tmp_path)


# disabling, merging, unloading


def test_disabling_gives_the_base_model_exactly(toy: Toy) -> None:
    model, batch = nudge(wrap(toy)), toy.batch()
    tuned, names = logits(model, batch), trainable(model)
    with model.disable_adapter():
        assert same(logits(model, batch), logits(toy.model(), batch))
        assert trainable(model) == []
    assert same(logits(model, batch), tuned)
    assert trainable(model) == names


def test_disabling_unmerges(toy: Toy) -> None:
    model, batch = nudge(wrap(toy)), toy.batch()
    tuned = logits(model, batch)
    model.merge_adapter()
    with model.disable_adapter():
        assert same(logits(model, batch), logits(toy.model(), batch))
    assert same(logits(model, batch), tuned)
    assert model.get_model_status().merged_adapters == []


def test_merging_and_unmerging_are_exact(toy: Toy) -> None:
    model, batch = nudge(wrap(toy)), toy.batch()
    tuned = logits(model, batch)
    state = copy.deepcopy(model.state_dict())

    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    assert same(logits(model, batch), tuned)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert same(logits(model, batch), tuned)
    model.unmerge_adapter()
    assert same(logits(model, batch), tuned)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()

    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_gives_the_original_class_with_tuned_weights(toy: Toy, merged_before: bool) -> None:
    model, batch = nudge(wrap(toy)), toy.batch()
    tuned = logits(model, batch)
    if merged_before:
        model.merge_adapter()

    merged = model.merge_and_unload(safe_merge=True)

    assert type(merged) is type(toy.model())
    assert list(merged.state_dict()) == list(toy.model().state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in toy.model().modules()]
    assert same(logits(merged, batch), tuned)


def test_unload_gives_the_base_model(toy: Toy) -> None:
    base = nudge(wrap(toy)).unload()
    assert list(base.state_dict()) == list(toy.model().state_dict())
    assert same(logits(base, toy.batch()), logits(toy.model(), toy.batch()))
    assert not hasattr(base, "peft_config")


def test_an_unloaded_model_can_be_wrapped_again(toy: Toy) -> None:
    merged = nudge(wrap(toy)).merge_and_unload()
    expected = logits(merged, toy.batch())
    with no_warnings():
        again = get_peft_model(merged, SurgicalConfig(blocks=[toy.last]))
    assert same(logits(again, toy.batch()), expected)
    assert trainable(again) == trainable(wrap(toy, blocks=[toy.last]))


# several adapters


def test_adapters_on_different_blocks_switch(toy: Toy) -> None:
    model, batch = wrap(toy, blocks=[toy.first]), toy.batch()
    model.add_adapter("second", SurgicalConfig(blocks=[toy.last]))
    first_names = trainable(model)
    nudge(model)
    first = logits(model, batch)

    model.set_adapter("second")
    second_names = trainable(model)
    assert same(logits(model, batch), logits(toy.model(), batch))
    nudge(model, seed=1)
    second = logits(model, batch)
    assert not set(first_names) & set(second_names)
    assert all(".default." in name for name in first_names) and all(".second." in name for name in second_names)

    model.set_adapter("default")
    assert trainable(model) == first_names
    assert same(logits(model, batch), first)
    model.set_adapter("second", inference_mode=True)
    assert trainable(model) == []
    assert same(logits(model, batch), second)

    model.base_model.set_adapter(["default", "second"])  # PEFT allows several, here they do not meet
    assert set(trainable(model)) == {*first_names, *second_names}


def test_adapters_on_the_same_block_switch(toy: Toy) -> None:
    model, batch = nudge(wrap(toy, blocks=[toy.first])), toy.batch()
    first, first_names = logits(model, batch), trainable(model)
    model.add_adapter("second", SurgicalConfig(blocks=[toy.first]))
    assert trainable(model) == first_names
    assert same(logits(model, batch), first)

    model.set_adapter("second")
    assert same(logits(model, batch), logits(toy.model(), batch))  # starts from the base, not from the first
    assert trainable(model) == [name.replace(".default.", ".second.") for name in first_names]
    model.set_adapter("default")
    assert same(logits(model, batch), first)
    with pytest.raises(SurgicalError, match="cannot be active at once"):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(SurgicalError, match="merge one"):
        model.merge_adapter(["default", "second"])
    assert same(logits(model, batch), first)


@pytest.mark.parametrize("second_blocks", ["same", "other"])
def test_each_of_two_adapters_saves_its_own_file(toy: Toy, tmp_path: Path, second_blocks: str) -> None:
    blocks = [toy.first] if second_blocks == "same" else [toy.last]
    model, batch = nudge(wrap(toy, blocks=[toy.first])), toy.batch()
    first = logits(model, batch)
    model.add_adapter("second", SurgicalConfig(blocks=blocks))
    model.set_adapter("second")
    nudge(model, seed=1)
    second = logits(model, batch)

    model.save_pretrained(tmp_path)

    for directory, expected in ((tmp_path, first), (tmp_path / "second", second)):
        loaded = PeftModel.from_pretrained(toy.model(), directory)
        assert same(logits(loaded, batch), expected)
        assert set(weights(directory)) <= {f"base_model.model.{name}" for name in toy.model().state_dict()}


@pytest.mark.parametrize("second_blocks", ["same", "other"])
def test_deleting_the_inactive_adapter_changes_nothing(vit: Toy, second_blocks: str) -> None:
    model, batch = nudge(wrap(vit, blocks=[vit.first])), vit.batch()
    expected, names = logits(model, batch), trainable(model)
    model.add_adapter("second", SurgicalConfig(blocks=[vit.first if second_blocks == "same" else vit.last]))
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    assert same(logits(model, batch), expected)
    assert trainable(model) == names


@pytest.mark.parametrize("second_blocks", [["0"], ["11"], ["0", "11"]])
def test_deleting_the_active_adapter_activates_the_other_in_all_layers(vit: Toy, second_blocks: list[str]) -> None:
    """Layers without the deleted adapter went on naming it, and the model was left with no adapter it knew of."""
    model, batch = nudge(wrap(vit, blocks=["0", "5"])), vit.batch()
    model.add_adapter("second", SurgicalConfig(blocks=second_blocks))
    model.set_adapter("second")
    second, names = logits(nudge(model, seed=1), batch), trainable(model)
    model.set_adapter("default")

    model.delete_adapter("default")

    assert model.active_adapter == "second" and model.active_adapters == ["second"]
    assert model.get_model_status().active_adapters == ["second"]
    assert same(logits(model, batch), second)
    assert trainable(model) == names


def test_deleting_the_last_adapter_leaves_the_base_model(vit: Toy) -> None:
    model = nudge(wrap(vit))
    model.delete_adapter("default")
    base = model.base_model.model  # PEFT lets the PeftModel itself run no more, whatever the method
    assert same(logits(base, vit.batch()), logits(vit.model(), vit.batch()))
    assert trainable(model) == []


def test_an_unknown_or_merged_adapter_is_not_deleted(vit: Toy) -> None:
    model = nudge(wrap(vit))
    expected = logits(model, vit.batch())
    with pytest.raises(ValueError, match="nope"):
        model.delete_adapter("nope")
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    assert same(logits(model, vit.batch()), expected)


# heads


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (SurgicalConfig(blocks=[0], modules_to_save=["classifier"]), ["0", "classifier"]),
        (SurgicalConfig(blocks=["head"]), ["head"]),
        (SurgicalConfig(blocks=["head"], task_type="SEQ_CLS"), ["head"]),
        (SurgicalConfig(blocks=[0], task_type="SEQ_CLS"), ["0", "classifier"]),
        (SurgicalConfig(target_modules=["classifier"], task_type="SEQ_CLS"), ["classifier"]),
    ],
    ids=["modules_to_save", "head", "head-seq_cls", "block-seq_cls", "target-seq_cls"],
)
def test_heads_are_trained_and_saved_once(
    name: str, config: SurgicalConfig, trained: list[str], tmp_path: Path
) -> None:
    toy = TOYS[name]
    modules = BlockMap.find(toy.model()).modules
    paths = [path for part in trained for path in modules.get(part, (part,))]
    expected = {key for key in toy.model().state_dict() if any(key.startswith(path + ".") for path in paths)}
    model = nudge(get_peft_model(toy.model(), copy.deepcopy(config)))
    tuned = logits(model, toy.batch())
    model.save_pretrained(tmp_path)

    assert {key.removeprefix("base_model.model.") for key in weights(tmp_path)} == expected
    assert len(trainable(model)) == len(expected)
    with no_warnings():
        loaded = PeftModel.from_pretrained(toy.model(), tmp_path, adapter_name="other")
    assert same(logits(loaded, toy.batch()), tuned)
    base = toy.model()
    assert not base.load_adapter(tmp_path).missing_keys
    assert same(logits(base, toy.batch()), tuned)
    merged = model.merge_and_unload()
    assert same(logits(merged, toy.batch()), tuned)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", r".*embed_tokens"])
def test_a_named_embedding_is_saved_without_its_original(target: str, tmp_path: Path) -> None:
    """PEFT found the original under `base_layer` and saved it beside the tuned copy: twice the size, foreign keys."""
    llama = TOYS["llama"]
    names = target if target.startswith(".*") else [target]
    model = nudge(get_peft_model(llama.model(), SurgicalConfig(target_modules=names)))
    model.save_pretrained(tmp_path)
    assert list(weights(tmp_path)) == [
        f"base_model.model.{'model.' if 'embed' in target else ''}{target.removeprefix('.*')}.weight"
    ]
    loaded = PeftModel.from_pretrained(llama.model(), tmp_path)
    assert same(logits(loaded, llama.batch()), logits(model, llama.batch()))


# with others


def test_copies_of_a_wrapped_model_answer_alike(toy: Toy) -> None:
    model, batch = nudge(wrap(toy)), toy.batch()
    expected = logits(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(logits(twin, batch), expected)
        assert trainable(twin) == trainable(model)
        nudge(twin)
    assert same(logits(model, batch), expected)


@pytest.mark.parametrize("name", ["vit", "llama", "t5"])
def test_compiles(name: str) -> None:
    toy = TOYS[name]
    model = nudge(wrap(toy))
    compiled = torch.compile(model, backend="eager")
    assert same(logits(compiled, toy.batch()), logits(model, toy.batch()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generates_what_the_merged_model_generates(name: str) -> None:
    model, tokens = nudge(wrap(TOYS[name])), TOYS[name].batch()["input_ids"]
    generated = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=tokens, max_new_tokens=4, do_sample=False), generated)


def test_a_model_with_accelerate_hooks_is_wrapped_trained_and_merged(toy: Toy) -> None:
    base, batch = toy.model(), toy.batch()
    accelerate.dispatch_model(base, device_map={"": "cpu"}, force_hooks=True)
    model = get_peft_model(base, SurgicalConfig(blocks=[toy.first, toy.last]))
    assert same(logits(model, batch), logits(toy.model(), batch))
    model(**batch).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    nudge(model)
    layer = next(module for module in model.modules() if isinstance(module, SurgicalLayer))
    tuned = layer.surgical_copies["default"]
    assert tuned._hf_hook is not layer.original_module._hf_hook
    assert same(logits(model, batch), logits(nudge(wrap(toy)), batch))
    assert same(logits(model.merge_and_unload(), batch), logits(nudge(wrap(toy)), batch))


def test_trainer_trains_saves_and_resumes(vit: Toy, tmp_path: Path) -> None:
    batch = vit.batch(size=16)
    examples = [{key: value[index] for key, value in batch.items()} for index in range(16)]

    def trainer(directory: str) -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path / directory),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            label_names=["labels"],
        )
        return Trainer(model=wrap(vit), args=args, train_dataset=examples)

    whole = trainer("run")
    whole.train()
    resumed = trainer("run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    assert not same(logits(whole.model.eval(), batch), logits(vit.model(), batch))
    for name in trainable(whole.model):
        assert torch.equal(resumed.model.get_parameter(name), whole.model.get_parameter(name))
    loaded = PeftModel.from_pretrained(vit.model(), tmp_path / "run" / "checkpoint-4")
    assert same(logits(loaded, batch), logits(whole.model.eval(), batch))
