"""The adapter's file and every way to load it, on every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import get_base_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch.distributed.fsdp import FullyShardedDataParallel

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.tuner.tensors.slots import BASE
from tests.support.toys import TOYS, Toy
from tests.support.wrapping import (
    AUTO_CLASSES,
    Saved,
    adapted,
    layers,
    logits,
    module_paths,
    no_warnings,
    nudge,
    same,
    trainable,
    weights,
    wrap,
)

# the file


def test_the_file_is_the_one_that_stock_peft_would_write(family: Toy, tmp_path: Path) -> None:
    ours = nudge(wrap(family))
    paths = module_paths(family.model(), family.first, family.last)
    stock = get_peft_model(family.model(), LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=paths))
    for mine, theirs in zip(trainable(ours), trainable(stock), strict=True):
        stock.get_parameter(theirs).data.copy_(ours.get_parameter(mine))

    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")

    mine, theirs = weights(tmp_path / "ours"), weights(tmp_path / "stock")
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_file_holds_the_tuned_weights_under_the_names_of_the_base_model(saved: Saved) -> None:
    names = {f"base_model.model.{name}" for name in saved.family.model().state_dict()}
    assert set(weights(saved.adapter)) <= names
    tuned = sum(tensor.nbytes for tensor in weights(saved.adapter).values())
    assert (saved.adapter / "adapter_model.safetensors").stat().st_size <= 1.001 * tuned + 8_000


def test_the_base_models_state_dict_can_be_had(family: Toy) -> None:
    base = family.model().state_dict()
    seen = get_base_model_state_dict(nudge(wrap(family)))
    assert list(seen) == list(base)
    assert all(torch.equal(seen[key], base[key]) for key in base)


def test_the_config_comes_back_as_it_was(saved: Saved) -> None:
    given = SurgicalConfig(blocks=[saved.family.first, saved.family.last])
    read = PeftConfig.from_pretrained(saved.adapter)
    assert type(read) is SurgicalConfig and read.peft_type == "SURGICAL"
    assert read.blocks == given.blocks and read.inference_mode is True
    assert Path(read.base_model_name_or_path) == saved.base
    assert PeftConfig.from_peft_type(**read.to_dict()) == read
    fresh = get_peft_model(saved.family.model(), given).peft_config["default"]
    settled = ("inference_mode", "base_model_name_or_path", "auto_mapping")  # what saving and the base model say
    assert {k: v for k, v in read.to_dict().items() if k not in settled} == {
        k: v for k, v in fresh.to_dict().items() if k not in settled
    }


def test_the_weights_can_be_had_set_and_injected(saved: Saved) -> None:
    """PEFT's functions for other libraries: a bare model with the wrappers in it."""
    batch, config = saved.family.batch(), SurgicalConfig(blocks=[saved.family.first, saved.family.last])
    base = saved.family.model()
    model = inject_adapter_in_model(config, base)
    assert model is base and same(logits(base, batch), saved.base_logits)
    assert [f"base_model.model.{name}" for name in trainable(base)] == trainable(wrap(saved.family))
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in weights(saved.adapter).items()}
    before = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(base).items()}
    assert before.keys() >= state.keys()  # BatchNorm in frozen blocks: no one keeps it in eval mode here
    assert before.keys() - state.keys() <= dict(base.named_buffers()).keys()

    result = set_peft_model_state_dict(base, state)
    assert result.unexpected_keys == []
    assert same(logits(base, batch), saved.tuned_logits)
    seen = get_peft_model_state_dict(base)
    assert all(torch.equal(seen[key], state[key]) for key in state)
    set_peft_model_state_dict(base, before)
    assert same(logits(base, batch), saved.base_logits)


def test_low_cpu_mem_usage_makes_no_weights_before_they_are_loaded(saved: Saved) -> None:
    base = saved.family.model()
    inject_adapter_in_model(SurgicalConfig(blocks=[saved.family.first]), base)
    inject_adapter_in_model(
        SurgicalConfig(blocks=[saved.family.first, saved.family.last]), base, "second", low_cpu_mem_usage=True
    )
    devices = {
        name: {tensor.device.type for layer in layers(base) for tensor in layer.tensors(name).values()}
        for name in (BASE, "default", "second")
    }
    assert devices == {BASE: {"cpu"}, "default": {"cpu"}, "second": {"meta"}}
    assert "meta" in {parameter.device.type for parameter in base.parameters()}  # it is the active one

    state = {key.removeprefix("base_model.model."): tensor for key, tensor in weights(saved.adapter).items()}
    set_peft_model_state_dict(base, state, adapter_name="second", low_cpu_mem_usage=True)

    assert {parameter.device.type for parameter in base.parameters()} == {"cpu"}
    for layer in layers(base):
        layer.set_adapter("second")
    assert same(logits(base, saved.family.batch()), saved.tuned_logits)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_under_fsdp_are_those_of_the_plain_model(saved: Saved, one_process: None) -> None:
    """Saving only: PEFT 0.21 puts no adapter back into a model that FSDP has wrapped already, LoRA neither."""
    model = PeftModel.from_pretrained(saved.family.model(), saved.adapter, is_trainable=True)
    assert trainable(model) == trainable(wrap(saved.family))
    plain = get_peft_model_state_dict(model)
    scalars = [parameter for parameter in model.parameters() if parameter.ndim == 0]  # FSDP takes none: CLIP's scale
    sharded = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), ignored_states=scalars
    )
    assert any("_fsdp_wrapped_module" in name for name, _ in sharded.named_parameters())

    state = get_peft_model_state_dict(sharded)

    assert list(state) == list(plain)
    assert set(state) == set(weights(saved.adapter))
    fresh = wrap(saved.family)
    set_peft_model_state_dict(fresh, state)
    assert same(logits(fresh, saved.family.batch()), saved.tuned_logits)


# loading


def test_loads_with_low_cpu_mem_usage_under_another_name(saved: Saved) -> None:
    with no_warnings():
        model = PeftModel.from_pretrained(
            saved.family.model(), saved.adapter, adapter_name="other", low_cpu_mem_usage=True
        )
    assert same(logits(model, saved.family.batch()), saved.tuned_logits)
    assert trainable(model) == []


# PEFT keeps adapters in an nn.ModuleDict: names with a dot, or of its own attributes ("keys"), fail for any method.
def test_loads_under_names_that_parts_of_the_model_have(saved: Saved, tmp_path: Path) -> None:
    expected = weights(saved.adapter)
    path = next(iter(expected)).removeprefix("base_model.model.").split(".")
    for name in (path[0], path[-1], next((part for part in path if part.isdigit() or part == "pooler"), path[1])):
        with no_warnings():
            model = PeftModel.from_pretrained(saved.family.model(), saved.adapter, adapter_name=name)
        model.save_pretrained(tmp_path, selected_adapters=[name])

        assert trainable(model) == []
        assert same(logits(model, saved.family.batch()), saved.tuned_logits)
        again = weights(tmp_path / name)
        assert list(again) == list(expected)
        assert all(torch.equal(again[key], expected[key]) for key in expected)

    with pytest.raises(SurgicalError, match="name of a module"):  # PEFT could not save one of two
        model.load_adapter(saved.adapter, adapter_name=path[0])
    assert list(model.peft_config) == [name]


NAMES = ("default", "default2", "other_default", "foodefault_bar", "efaul")


def test_adapters_whose_names_hold_one_anothers_are_kept_apart(family: Toy, tmp_path: Path) -> None:
    model = wrap(family)
    tuned = {}
    for seed, name in enumerate(NAMES):
        if name != "default":
            model.add_adapter(name, SurgicalConfig(blocks=[family.first, family.last]))
            model.set_adapter(name)
        nudge(model, seed)
        tuned[name] = {key: tensor.detach().clone() for key, tensor in adapted(model).items()}
    assert all(list(tuned[name]) == list(tuned["default"]) for name in NAMES)

    model.save_pretrained(tmp_path, selected_adapters=list(NAMES[::2]))

    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(NAMES[2::2])
    for name in NAMES[::2]:
        file = weights(tmp_path if name == "default" else tmp_path / name)
        assert all(torch.equal(file[f"base_model.model.{key}"], tensor) for key, tensor in tuned[name].items())
    assert len({len(get_peft_model_state_dict(model, adapter_name=name)) for name in NAMES}) == 1


def test_a_second_adapter_loads_without_a_missing_or_unexpected_key(saved: Saved) -> None:
    model = wrap(saved.family, blocks=[saved.family.last])
    before = trainable(model)
    with no_warnings():
        result = model.load_adapter(saved.adapter, adapter_name="second")
    assert result.missing_keys == result.unexpected_keys == []
    assert trainable(model) == before
    assert same(logits(model, saved.family.batch()), saved.base_logits)

    model.set_adapter("second")
    assert same(logits(model, saved.family.batch()), saved.tuned_logits)


def test_auto_classes_load_the_adapter_directory(saved: Saved) -> None:
    for auto in (AUTO_CLASSES[saved.family.name], AutoPeftModel):
        assert same(logits(auto.from_pretrained(saved.adapter), saved.family.batch()), saved.tuned_logits)


def test_transformers_loads_switches_and_disables_the_adapter(saved: Saved) -> None:
    base, batch = saved.family.model(), saved.family.batch()
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
    # With names that parts of the model have, transformers reports base weights as missing, for any method.
    for name in ("0", "bias"):
        base.load_adapter(saved.adapter, adapter_name=name)
        assert same(logits(base, batch), saved.tuned_logits)
        base.delete_adapter(name)


def test_transformers_adds_and_saves_the_adapter(family: Toy, tmp_path: Path) -> None:
    base = family.model()
    base.add_adapter(SurgicalConfig(blocks=[family.first, family.last]))
    nudge(base)
    base.save_pretrained(tmp_path)

    model = PeftModel.from_pretrained(family.model(), tmp_path)

    assert same(logits(model, family.batch()), logits(base, family.batch()))


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
    with pytest.raises(SurgicalError, match=r"'11'.*BertForSequenceClassification"):
        PeftModel.from_pretrained(TOYS["bert"].model(), tmp_path / "vit")
    with pytest.raises(SurgicalError, match=r"ViTForImageClassification.*vit\.layers\.0"):
        PeftModel.from_pretrained(TOYS["vit"].model(), tmp_path / "bert")


def test_an_adapter_of_other_shapes_is_refused(tmp_path: Path) -> None:
    bert = TOYS["bert"]
    wrap(bert).save_pretrained(tmp_path)
    config = copy.deepcopy(bert.model().config)
    config.intermediate_size *= 2
    with pytest.raises(SurgicalError, match="size"):
        PeftModel.from_pretrained(type(bert.model())(config), tmp_path)
