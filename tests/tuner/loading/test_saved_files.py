"""Whatever is wrong with a saved adapter: a clear error through every door, and the model as it was."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.config import PeftConfigMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification
from transformers.conversion_mapping import get_model_conversion_mapping

from surgical_peft import SurgicalConfig, SurgicalError, get_surgical_model
from surgical_peft.tuner import name_checks as patterns
from surgical_peft.tuner.loading import saved_files as loading
from tests.support.toys import TOYS
from tests.support.wrapping import logits, nudge

VIT = TOYS["vit"]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter beside its base model, with a head to save as well."""
    folder = tmp_path_factory.mktemp("good")
    VIT.model().save_pretrained(folder / "base")
    base = AutoModelForImageClassification.from_pretrained(folder / "base")
    nudge(get_peft_model(base, SurgicalConfig(blocks=[0, 11], modules_to_save=["classifier"]))).save_pretrained(
        folder / "adapter"
    )
    return folder / "adapter"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


# What can be wrong. Each spoils the folder.


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def config(**fields: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **fields}))

    return spoil


def cut(name: str, keep: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    return spoil


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


@functools.cache
def files_of(make: Callable[[], nn.Module]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        make().save_pretrained(folder)  # type: ignore[operator]
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def bert() -> nn.Module:
    return get_peft_model(TOYS["bert"].model(), SurgicalConfig(blocks=[0, 1]))


def headless() -> nn.Module:
    base: Any = VIT.model()
    return get_peft_model(base.vit, SurgicalConfig(blocks=[0, 11]))


def larger() -> nn.Module:
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, num_labels=3))
    return get_peft_model(model, SurgicalConfig(blocks=[0, 11], modules_to_save=["classifier"]))


def of(make: Callable[[], nn.Module]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name, content in files_of(make).items():
            (folder / name).write_bytes(content)

    return spoil


KEY = "base_model.model.vit.layers.0.layernorm_before.weight"
OTHER = "base_model.model.vit.layers.5.layernorm_before.weight"
HOSTILE = r"(\w+\.?)+!"

BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut(WEIGHTS, -100), "safetensors"),
    "cut in the header": (cut(WEIGHTS, 40), "safetensors"),
    "empty": (cut(WEIGHTS, 0), "safetensors"),
    "garbage": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 1000), "safetensors"),
    "a weight missing": (weights(lambda t: t.pop(KEY)), r"1 of 34 .*vit\.layers\.0\.layernorm_before"),
    "the head missing": (weights(lambda t: t.pop("base_model.model.classifier.bias")), r"\(classifier\.bias\)"),
    "one too many": (
        weights(lambda t: t.update({OTHER: torch.ones(16)})),
        r"\(vit\.layers\.5",
    ),
    "one twice": (
        weights(lambda t: t.update({KEY.replace(".layernorm", ".original_module.layernorm"): torch.zeros(16)})),
        "twice",
    ),
    "another shape": (weights(lambda t: t.update({KEY: torch.ones(8)})), r"\(8,\) .*\(16,\) .*ViTFor"),
    "another shape of the head": (
        weights(lambda t: t.update({"base_model.model.classifier.bias": torch.ones(9)})),
        r"classifier\.bias .*\(9,\)",
    ),
    "another model": (of(bert), r"ViTFor.*32 of 32 .*architecture"),
    "the model without head": (of(headless), r"32 of 32 .*\(vit\.layers.*\(layers"),
    "a larger model": (of(larger), r"size.*\(.*32.*\).*\(.*16.*\)"),
    "pickled": (pickled, r"adapter_model\.bin.*safetensors\.torch\.save_file"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "whole numbers": (weights(lambda t: t.update({KEY: t[KEY].to(torch.int64)})), "layernorm_before.*kind"),
    "truths": (weights(lambda t: t.update({KEY: t[KEY] > 0})), "kind"),
    "a name without end": (weights(lambda t: t.update({"x" * 10**6: torch.ones(1)})), "1,000,000"),
}
BAD_CONFIG: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut config": (cut(CONFIG, -100), f"{CONFIG} .*JSON"),
    "binary config": (lambda f: (f / CONFIG).write_bytes(b'{"blocks": "\xff"}'), f"{CONFIG} .*JSON"),
    "nested config": (lambda f: (f / CONFIG).write_text('{"blocks":' + "[" * 10**5), "JSON"),
    "another type": (config(peft_type="SURGICA"), "SURGICA"),
    "a type that is no name": (config(peft_type=[1]), "peft_type"),
    "no task": (config(task_type="NO"), "task_type"),
    "no type": (lambda f: (f / CONFIG).write_text('{"blocks": ["0"]}'), "'peft_type'"),
    "an unknown block": (config(blocks=["0", "12"]), "'12'"),
    "a path as block": (config(blocks=["../../etc/passwd"]), "file path"),
    "an absolute path as module": (config(target_modules=["/etc/passwd"]), "file path"),
    "a drive as module to save": (config(modules_to_save=["C:\\x"]), "file path"),
    "a number as module": (config(target_modules=[3]), " 3, "),
    "a number for modules": (config(target_modules=3), "target_modules=3 .*int"),
    "nothing as module to save": (config(modules_to_save=[None]), "holds None"),
    "a list as block": (config(blocks=[["0"]]), r"\['0'\]"),
    "a number for blocks": (config(blocks=3.5), "3.5 "),
    "a word for a truth": (config(frozen_eval="no"), "frozen_eval='no' .*str"),
    "a number for lora": (config(lora=3), "lora=3 .*int"),
    "a lora of no fields": (config(lora={"nonsense": 1}), "LoraConfig"),
    "no regular expression": (config(target_modules="*x("), r"'\*x\(' .*regular expression"),
    "a regular expression without end": (config(target_modules=HOSTILE), "matched"),
    "an exclusion without end": (config(exclude_modules=HOSTILE), "exclude_modules=.*matched"),
    "a lora without end": (config(lora={"target_modules": HOSTILE}), "lora: target_modules=.*matched"),
    "code to run": (config(blocks="auto", criterion="os:system"), "'os:system'"),
    "blocks left open": (config(blocks="auto"), "blocks='auto' "),
    "an unknown keep_base": (config(keep_base="disk"), "keep_base='disk'"),
}

# Doors: how the model is made, and how the adapter gets in.


def bare() -> nn.Module:
    return VIT.model()


def with_an_adapter() -> nn.Module:
    return nudge(get_peft_model(VIT.model(), SurgicalConfig(blocks=[5])))


def with_an_adapter_of_transformers() -> Any:
    model: Any = VIT.model()
    model.add_adapter(SurgicalConfig(blocks=[5]))
    return nudge(model)


DOORS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], Any]]] = {
    "PeftModel.from_pretrained": (bare, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "low_cpu_mem_usage": (
        bare,
        lambda model, folder: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True),
    ),
    "config given": (
        bare,
        lambda model, folder: PeftModel.from_pretrained(model, folder, config=PeftConfig.from_pretrained(folder)),
    ),
    "PeftModel.load_adapter": (with_an_adapter, lambda model, folder: model.load_adapter(folder, "second")),
    "transformers": (bare, lambda model, folder: model.load_adapter(folder)),
    "transformers, second": (
        with_an_adapter_of_transformers,
        lambda model, folder: model.load_adapter(folder, adapter_name="second"),
    ),
}


SOME_DOORS = ["PeftModel.load_adapter", "transformers"]
# One of each: of files and of configs that cannot be read, that do not fit, that would do harm.
KINDS = ["truncated", "pickled", "no weights", "a weight missing", "one too many", "another shape", "another model"]
KINDS += ["cut config", "an unknown block", "a path as block", "a regular expression without end", "code to run"]


def picture(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a failed call could have changed."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        list(getattr(model, "peft_config", {})),
        getattr(model, "_hf_peft_config_loaded", False),
        [name for name, _ in model.state_dict().items()],
        [*(value.clone() for value in model.state_dict().values()), logits(model, VIT.batch())],
    )


def same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return now[:-1] == before[:-1] and all(map(torch.equal, now[-1], before[-1]))


@pytest.mark.parametrize(
    ("bad", "door"),
    [
        *((bad, door) for bad in BAD for door in (DOORS if bad in KINDS else SOME_DOORS)),
        *((bad, door) for bad in BAD_CONFIG for door in (SOME_DOORS if bad in KINDS else SOME_DOORS[:1])),
    ],
)
def test_a_bad_adapter_is_refused_and_the_model_as_before(
    bad: str, door: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "LONGEST_MATCHING", 0.2)
    spoil, message = {**BAD, **BAD_CONFIG}[bad]
    spoil(folder)
    make, load = DOORS[door]
    model = make()
    before = picture(model)
    with pytest.raises(SurgicalError, match=message):
        load(model, folder)
    assert same(picture(model), before)


@pytest.mark.parametrize("door", DOORS)
def test_a_good_adapter_gets_in_through_every_door(door: str, good: Path) -> None:
    make, load = DOORS[door]
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # PEFT's, of any second adapter
        loaded = load(model, good)
    model = loaded if isinstance(loaded, PeftModel) else model
    model.set_adapter("second" if "second" in model.peft_config else "default")
    assert torch.equal(logits(model, VIT.batch()), logits(AutoPeftModel.from_pretrained(good), VIT.batch()))


@pytest.mark.parametrize("auto", [AutoPeftModel, AutoModelForImageClassification])
@pytest.mark.parametrize("bad", ["truncated", "a weight missing", "another shape", "pickled", "an unknown block"])
def test_classes_that_build_the_model_themselves_refuse_too(bad: str, auto: Any, folder: Path) -> None:
    spoil, message = {**BAD, **BAD_CONFIG}[bad]
    spoil(folder)
    with pytest.raises(SurgicalError, match=message):
        auto.from_pretrained(folder)


@pytest.mark.parametrize("model", [bare, with_an_adapter])
def test_an_adapter_that_is_not_there(model: Callable[[], Any], tmp_path: Path) -> None:
    made = model()
    before = picture(made)
    with pytest.raises(ValueError, match=f"Can't find '{CONFIG}'"):  # before the method is known: PEFT's own
        made.load_adapter(tmp_path, "second") if isinstance(made, PeftModel) else PeftModel.from_pretrained(
            made, tmp_path
        )
    assert same(picture(made), before)


@pytest.mark.parametrize("door", DOORS)
def test_what_is_pickled_is_never_opened(door: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(folder)
    model = DOORS[door][0]()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("opened"))
    with pytest.raises(SurgicalError, match="pickled"):
        DOORS[door][1](model, folder)


# Weights for an adapter that is there already, as Trainer does when it resumes


@pytest.mark.parametrize("bad", ["truncated", "a weight missing", "one too many", "another shape", "another model"])
def test_new_weights_for_an_adapter_that_is_there(bad: str, folder: Path) -> None:
    model = get_peft_model(VIT.model(), SurgicalConfig(blocks=[0, 11], modules_to_save=["classifier"]))
    spoil, _ = BAD[bad]
    spoil(folder)
    before = picture(model)
    # PEFT looks up what is in modules_to_save by itself, before us: the head that BERT's adapter has not
    error: Any = (SurgicalError, KeyError) if bad == "another model" else SurgicalError
    if bad == "truncated":
        error = SafetensorError
    with pytest.raises(error):
        model.load_adapter(folder, "default", is_trainable=True)
    assert same(picture(model), before)


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("bad", ["a weight missing", "one too many", "another shape", "good"])
def test_a_state_dict_is_checked_before_it_is_loaded(bad: str, injected: bool, folder: Path) -> None:
    model: Any = VIT.model()
    choice = SurgicalConfig(blocks=[0, 11])
    if injected:
        model.add_adapter(choice)
    else:
        model = get_peft_model(model, choice)
    if bad != "good":
        BAD[bad][0](folder)
    state = {key: value for key, value in load_file(folder / WEIGHTS).items() if "classifier" not in key}
    before = picture(model)
    if bad == "good":
        result = set_peft_model_state_dict(model, state)
        assert not result.unexpected_keys
        assert torch.equal(model.get_submodule(_layer(model))(torch.ones(1, 3, 16)), _tuned_output(folder))
        return
    with pytest.raises(SurgicalError):
        set_peft_model_state_dict(model, state)
    assert same(picture(model), before)


def _layer(model: nn.Module) -> str:
    return "base_model.model.vit.layers.0" if isinstance(model, PeftModel) else "vit.layers.0"


def _tuned_output(folder: Path) -> torch.Tensor:
    layer: Any = VIT.model().get_submodule("vit.layers.0")
    prefix = "base_model.model.vit.layers.0."
    saved = load_file(folder / WEIGHTS)
    layer.load_state_dict({key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)})
    with torch.no_grad():
        return layer(torch.ones(1, 3, 16))


# Names that are not there, and two at once


def two_adapters() -> Any:
    model = with_an_adapter()
    model.add_adapter("second", SurgicalConfig(blocks=[5, 6]))
    return model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda model: model.set_adapter("third"), ValueError, "third not found"),
        (lambda model: model.delete_adapter("third"), ValueError, "third"),
        (
            lambda model: model.merge_adapter(["third"]),
            SurgicalError,
            "'third'.*default, sec",
        ),
        (lambda model: model.merge_and_unload(adapter_names=["third"]), SurgicalError, "'third'"),
        (lambda model: model.base_model.set_adapter(["default", "second"]), SurgicalError, "same block"),
        (lambda model: model.merge_adapter(["default", "second"]), SurgicalError, "same block"),
        (lambda model: model.merge_and_unload(adapter_names=["default", "second"]), SurgicalError, "the same block"),
        (lambda model: model.add_adapter("second", SurgicalConfig(blocks=[1])), ValueError, "already exists"),
    ],
)
def test_what_cannot_be_switched_or_merged(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    model = two_adapters()
    before = picture(model)
    with pytest.raises(error, match=message):
        call(model)
    assert same(picture(model), before)
    assert model.active_adapters == ["default"] and model.get_model_status().merged_adapters == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.set_adapter("third"), "third not found"),
        (lambda model: model.delete_adapter("third"), "third"),
        (lambda model: model.load_adapter("x", adapter_name="default"), "already exists"),
        (lambda model: model.set_adapter(["default", "second"]), "same block"),
    ],
)
def test_what_transformers_cannot_switch(call: Callable[[Any], Any], message: str) -> None:
    model = with_an_adapter_of_transformers()
    model.add_adapter(SurgicalConfig(blocks=[5, 6]), adapter_name="second")
    model.set_adapter("default")
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert same(picture(model), before)
    assert model.active_adapters() == ["default"]


# What is no harm


def test_sensible_expressions_with_repeated_groups_are_understood() -> None:
    model = get_peft_model(VIT.model(), SurgicalConfig(target_modules=r"(\w+\.)*layers\.(1|2)\.(mlp|attention)"))
    assert sorted(model.targeted_module_names) == [f"vit.layers.{i}.{m}" for i in (1, 2) for m in ("attention", "mlp")]


def test_fields_of_a_later_version_are_kept(folder: Path, tmp_path: Path) -> None:
    config(invented_later={"a": [1]}, read_from="/etc/passwd")(folder)
    with pytest.warns(UserWarning, match="invented_later.*read_from") as caught:
        model = PeftModel.from_pretrained(VIT.model(), folder)
    assert len([each for each in caught if "invented_later" in str(each.message)]) == 1
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert again["invented_later"] == {"a": [1]} and again["read_from"] == "/etc/passwd"
    assert again.keys() == json.loads((folder / CONFIG).read_text()).keys()


def test_a_choice_that_was_read_can_be_made_afresh_on_another_model(folder: Path) -> None:
    """Not a loading: the weights beside the config are another model's, or are not there."""
    of(larger)(folder)
    choice = SurgicalConfig.from_pretrained(folder)
    assert logits(get_peft_model(VIT.model(), choice), VIT.batch()).shape == (4, 3)
    (folder / WEIGHTS).unlink()
    get_peft_model(VIT.model(), SurgicalConfig.from_pretrained(folder))
    injected: Any = VIT.model()
    injected.add_adapter(SurgicalConfig.from_pretrained(folder))


def test_other_methods_are_left_alone(tmp_path: Path) -> None:
    get_peft_model(VIT.model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    (tmp_path / WEIGHTS).write_bytes(b"")
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(json.JSONDecodeError):
        PeftConfig.from_pretrained(tmp_path)


def test_what_is_no_config_at_all_is_pefts_error(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('{"foo": "bar"}')
    with pytest.raises(TypeError, match=r"\{'peft_type'\}"):
        SurgicalConfig.from_pretrained(tmp_path)


def test_watching_again_changes_nothing() -> None:
    loading.watch_reading()
    reads: Any = PeftConfigMixin.__dict__["from_json_file"].__func__
    assert not hasattr(reads._surgical_original, "_surgical_original")


def test_resized_embeddings_come_along(tmp_path: Path) -> None:
    """PEFT saves them beside any adapter when they were resized."""
    llama = TOYS["llama"]
    llama.model().save_pretrained(tmp_path / "base")

    def resized() -> Any:
        model: Any = type(llama.model()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(30, mean_resizing=False)
        return model

    tuned = nudge(get_peft_model(resized(), SurgicalConfig(blocks=[0])))
    with pytest.warns(UserWarning, match="resized"):
        tuned.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(PeftModel.from_pretrained(resized(), tmp_path / "adapter"), llama.batch()), logits(tuned, llama.batch())
    )
    with pytest.raises(SurgicalError, match="resize_token_embeddings first"):
        PeftModel.from_pretrained(llama.model(), tmp_path / "adapter")


def endless(**lora: Any) -> SurgicalConfig:
    return SurgicalConfig(blocks=["head"], lora={"r": 2, "target_modules": ["query"], **lora})


@pytest.mark.parametrize(
    "config",
    [
        endless(rank_pattern={HOSTILE: 4, "query": 2}),
        endless(alpha_pattern={"x": 1, HOSTILE: 4, "query": 2}),
        endless(layers_pattern=[HOSTILE], layers_to_transform=[0]),
        endless(rank_pattern={f"layer{n}": 4 for n in range(3000)}),
        endless(rank_pattern={"(": 4}),
        SurgicalConfig(target_modules={"0": HOSTILE, "1": "all"}),
    ],
    ids=["rank", "alpha", "layers", "thousands", "none", "by block"],
)
def test_every_expression_of_a_config_is_tried(config: SurgicalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last of several ranks was, and thousands took an hour."""
    monkeypatch.setattr(patterns, "LONGEST_MATCHING", 0.2)
    with pytest.raises(SurgicalError):
        get_peft_model(TOYS["bert"].model(), config)


def test_expressions_are_tried_before_blocks_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block was asked whether it can be tuned, without end."""
    monkeypatch.setattr(patterns, "LONGEST_MATCHING", 0.2)
    config = SurgicalConfig(blocks="auto", num_blocks=1, criterion="random", target_modules=HOSTILE)
    with pytest.raises(SurgicalError, match="matched"):
        get_surgical_model(VIT.model(), config, [VIT.batch()])


def test_expressions_are_tried_on_parts_of_saved_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole name may match at once, and the part without its end never."""
    monkeypatch.setattr(patterns, "LONGEST_MATCHING", 0.2)
    weights(lambda t: t.update({f"base_model.model.{'a' * 60}.x.y": torch.ones(1)}))(folder)
    config(target_modules=r".*y|(a+)+b")(folder)
    with pytest.raises(SurgicalError, match="matched"):
        PeftModel.from_pretrained(VIT.model(), folder)


def test_plain_expressions_are_not_tried_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.subprocess, "run", lambda *args, **kwargs: pytest.fail("tried"))
    expressions = [r".*\.(q_proj|v_proj)", r"vit\.layers\.\d+\.mlp", ".*attention.*", "all-linear"]
    patterns.check_matching(dict(zip("abcd", expressions, strict=True)), ["vit.layers.0.mlp"])
    with pytest.raises(pytest.fail.Exception, match="tried"):
        patterns.check_matching({"a": "(a+)+"}, ["a"])


# From the Hub: what lies in its cache


@pytest.mark.parametrize("door", ["PeftModel.from_pretrained", "transformers"])
@pytest.mark.parametrize("there", [True, False])
def test_an_adapter_in_the_cache_of_the_hub(door: str, there: bool, good: Path, monkeypatch: Any) -> None:
    cache = Path(HF_HUB_CACHE) / "models--someone--adapter"
    snapshot = cache / "snapshots" / ("a" * 40)
    try:
        shutil.copytree(good, snapshot)
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("a" * 40)
        if not there:
            (snapshot / WEIGHTS).unlink()
        model = VIT.model()
        before = picture(model)
        if there:
            model = DOORS[door][1](model, "someone/adapter") if door != "transformers" else model
            if door == "transformers":
                model.load_adapter("someone/adapter")
            assert torch.equal(logits(model, VIT.batch()), logits(AutoPeftModel.from_pretrained(good), VIT.batch()))
            return
        with pytest.raises(SurgicalError, match=f"'someone/adapter'.*{WEIGHTS}"):
            DOORS[door][1](model, "someone/adapter")
        assert same(picture(model), before)
    finally:
        shutil.rmtree(cache)


# Names that transformers has changed


def renamed_backwards(model: Any, folder: Path) -> None:
    """Give the weights the names that modules had before transformers renamed them."""
    changes = [each.reverse_transform() for each in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
    prefix = "base_model.model."
    old: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        name = key.removeprefix(prefix)
        for change in changes:
            name, _ = change.rename_source_key(name)
        old[prefix + name] = tensor
    save_file(old, folder / WEIGHTS)


def _llava() -> nn.Module:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {**small, "vocab_size": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**text, num_key_value_heads=1),
        image_token_id=3,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


RENAMED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "vit": (VIT.model, {"blocks": [0, 11]}, "vit.encoder.layer.11.attention.attention.query.weight"),
    "vit, part": (
        VIT.model,
        {"blocks": [0, 11], "target_modules": ["attention.attention", "intermediate"]},
        "vit.encoder.layer.0.intermediate.dense.weight",
    ),
    "vit, parts by block": (
        VIT.model,
        {"target_modules": {"0": ["query"], "11": "all"}},
        "vit.encoder.layer.0.attention.attention.query.weight",
    ),
    "vit, expression": (
        VIT.model,
        {"target_modules": r".*layer\.[23]\.attention\.output"},
        "vit.encoder.layer.3.attention.output.dense.weight",
    ),
    "llava": (_llava, {"blocks": ["language_model[-1]"]}, "language_model.model.layers.1.mlp.up_proj.weight"),
}
TODAY = {  # what the old names above are called now
    "vit, part": ["q_proj", "k_proj", "v_proj", "mlp.fc1"],
    "vit, parts by block": {"0": ["q_proj"], "11": "all"},
    "vit, expression": r".*layers\.[23]\.attention\.o_proj",
}


@pytest.mark.parametrize(
    ("case", "door"),
    [
        *itertools.product(RENAMED, ["PeftModel.from_pretrained", "transformers"]),
        *itertools.product(["vit, part"], ["low_cpu_mem_usage", "config given", "PeftModel.load_adapter"]),
    ],
)
def test_an_adapter_saved_under_old_names_loads(case: str, door: str, tmp_path: Path) -> None:
    build, choice, old_name = RENAMED[case]
    today = {**choice, "target_modules": TODAY[case]} if case in TODAY else choice
    tuned = nudge(get_peft_model(build(), SurgicalConfig(**today)))
    tuned.save_pretrained(tmp_path)
    renamed_backwards(build(), tmp_path)
    assert f"base_model.model.{old_name}" in load_file(tmp_path / WEIGHTS)
    if "target_modules" in choice:
        config(target_modules=choice["target_modules"])(tmp_path)
    expected = dict(tuned.named_parameters())

    model = build() if door != "PeftModel.load_adapter" else get_peft_model(build(), SurgicalConfig(**today))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = DOORS[door][1](model, tmp_path)
    model = loaded if isinstance(loaded, PeftModel) else model
    adapter = "second" if door == "PeftModel.load_adapter" else "default"
    model.set_adapter(adapter)
    for name, parameter in model.named_parameters():
        there = name if isinstance(model, PeftModel) else f"base_model.model.{name}"
        assert torch.equal(parameter, expected[there]), name


def test_names_that_a_models_author_has_changed_are_followed(tmp_path: Path) -> None:
    toy = TOYS["bert"]

    class Renamed(type(toy.model())):  # type: ignore[misc]
        _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {r"^old\.": "bert."}

    Renamed.__module__ = "transformers_modules.renamed"
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[0]))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("model.bert.", "model.old."): value for key, value in load_file(file).items()}, file)
    base = toy.model()
    base.__class__ = Renamed
    loaded = PeftModel.from_pretrained(base, tmp_path)
    wanted = dict(model.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in loaded.named_parameters() if ".layer.0." in n)


def test_what_a_copy_shares_with_the_original_is_not_reported_missing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Loading an adapter of all norms made PEFT warn of every other weight in its blocks."""
    toy = TOYS["vit"]
    config = SurgicalConfig(blocks=[0, 10], target_modules={"0": "all-norm", "10": "all"})
    get_peft_model(toy.model(), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy.model(), tmp_path)
    assert not [each for each in recwarn if "missing" in str(each.message)]
    own = set(loaded.state_dict())
    assert any(".surgical_." in key for key in own)
    assert set(missing_of(loaded)) == own


def missing_of(model: nn.Module) -> list[str]:
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict({})
    return re.findall(r'"([^"]+)"', str(raised.value))
