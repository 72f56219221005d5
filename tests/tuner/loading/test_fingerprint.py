"""An adapter knows the base model that it was made from, and says so when it meets another."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from surgical_peft import SurgicalConfig, SurgicalError
from surgical_peft.tuner.loading import fingerprint as module
from surgical_peft.tuner.loading.fingerprint import differ_in_dtype, each_read_once, fingerprint
from tests.support.families import FAMILIES
from tests.support.toys import TOYS
from tests.support.wrapping import nudge

VIT = TOYS["vit"]
CONFIG = "adapter_config.json"


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator), torch.tensor(2.0)]


def changed(model: nn.Module) -> Any:
    with torch.no_grad():
        model.get_parameter("vit.layers.0.mlp.fc1.weight")[0, 0] += 1e-3
    return model


# the digest


def test_names_order_and_layout_do_not_count() -> None:
    one, two, three = weights()
    assert fingerprint([one, two, three]) == fingerprint([three, one.T.contiguous().T, two])
    assert fingerprint([nn.Parameter(one)]) == fingerprint([one])


def test_many_fingerprints_read_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every start of 30 blocks read all weights 15 times over."""
    all_weights = weights()
    expected = [fingerprint(all_weights[:count]) for count in (1, 2, 3)]
    read: list[tuple[int, ...]] = []
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda weight: read.append(tuple(weight.shape)) or digest(weight))
    with each_read_once() as digests:
        assert [fingerprint(all_weights[:count]) for count in (1, 2, 3)] == expected
        copies = [weight.clone() for weight in all_weights]
        digests.update(zip(copies, map(digests.get, all_weights), strict=True))
        assert fingerprint(copies) == expected[-1]
    assert sorted(read) == [(), (3, 4), (5,)]
    all_weights[1] += 1
    assert fingerprint(all_weights) != expected[-1]


@pytest.mark.parametrize(
    "other",
    [
        [weights()[0] + 1e-6, *weights()[1:]],
        [weights()[0].reshape(4, 3), *weights()[1:]],
        [weights()[0].double(), *weights()[1:]],
        [weights()[0].view(torch.int32), *weights()[1:]],
        weights()[:2],
        [*weights(), weights()[0]],
    ],
)
def test_values_shapes_and_dtypes_count(other: list[torch.Tensor]) -> None:
    assert fingerprint(other) != fingerprint(weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.complex64])
def test_any_dtype_has_one_and_it_is_named(dtype: torch.dtype) -> None:
    found = fingerprint([torch.ones(3).to(dtype)])
    assert found is not None and found.startswith(f"{str(dtype).removeprefix('torch.')}:")
    assert differ_in_dtype(found, str(fingerprint([torch.ones(3)])))
    assert not differ_in_dtype(found, str(fingerprint([torch.zeros(3).to(dtype)])))


def test_several_dtypes_are_all_named() -> None:
    assert str(fingerprint([torch.ones(1), torch.ones(1).half()])).startswith("float16+float32:")


@pytest.mark.parametrize("absent", [torch.empty(3, device="meta"), torch.empty(0)])
def test_what_cannot_be_read_has_none(absent: torch.Tensor) -> None:
    assert fingerprint([*weights(), absent]) is None
    assert fingerprint([]) is None


# in the config


def saved(folder: Path, base: nn.Module | None = None, **kwargs: Any) -> dict[str, Any]:
    get_peft_model(base or VIT.model(), SurgicalConfig(**kwargs)).save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text())


def test_it_is_of_the_base_weights_that_are_tuned(tmp_path: Path) -> None:
    base = VIT.model()
    expected = fingerprint(p for name in ("0", "11") for p in base.get_submodule(f"vit.layers.{name}").parameters())
    assert saved(tmp_path, base, blocks=[0, 11])["fingerprint"] == expected
    part = fingerprint(
        p for name, p in VIT.model().named_parameters() if "layers.0." in name and name.endswith("bias")
    )
    assert saved(tmp_path, blocks=[0], target_modules="all-bias")["fingerprint"] == part


@pytest.mark.parametrize("keep_base", ["device", "cpu"])
def test_a_second_adapter_has_that_of_the_original_weights(keep_base: str) -> None:
    model = get_peft_model(VIT.model(), SurgicalConfig(blocks=[0, 1], keep_base=keep_base))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.merge_adapter()
    model.add_adapter("second", SurgicalConfig(blocks=[0, 1], keep_base=keep_base))
    assert model.peft_config["second"].fingerprint == model.peft_config["default"].fingerprint is not None


def test_training_in_place_keeps_that_of_before(tmp_path: Path) -> None:
    expected = saved(tmp_path, blocks=[0])["fingerprint"]
    model = get_peft_model(VIT.model(), SurgicalConfig(blocks=[0], keep_base="none"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "trained")
    assert model.peft_config["default"].fingerprint == expected


def test_a_config_used_again_on_another_base_has_that_one() -> None:
    choice = SurgicalConfig(blocks=[0])
    first = get_peft_model(VIT.model(), choice).peft_config["default"].fingerprint
    assert get_peft_model(changed(VIT.model()), choice).peft_config["default"].fingerprint != first


def test_on_the_meta_device_there_is_none() -> None:
    with torch.device("meta"):
        model = type(VIT.model())(VIT.model().config)
    assert get_peft_model(model, SurgicalConfig(blocks=[0])).peft_config["default"].fingerprint is None


# when loading


def load(door: str, base: Any, folder: Path, **kwargs: Any) -> Any:
    if door == "PeftModel.from_pretrained":
        return PeftModel.from_pretrained(base, folder, **kwargs)
    if door == "PeftModel.load_adapter":
        model = get_peft_model(base, SurgicalConfig(blocks=[5], **kwargs))
        model.load_adapter(folder, "second")
        return model
    base.load_adapter(folder, peft_config=SurgicalConfig.from_pretrained(folder, **kwargs) if kwargs else None)
    return base


DOORS = ["PeftModel.from_pretrained", "PeftModel.load_adapter", "transformers"]


@pytest.mark.parametrize("strict", [{}, {"strict_base": True}])
@pytest.mark.parametrize("door", DOORS)
def test_the_same_base_is_silent(door: str, strict: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, blocks=[0, 11])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(door, VIT.model(), tmp_path, **strict)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("blocks", [[0, 11], ["embeddings"], "0:11"])
def test_frozen_weights_count_too(door: str, blocks: Any, tmp_path: Path) -> None:
    """They passed unnoticed, also with strict_base=True, and the logits were others."""
    saved(tmp_path, blocks=blocks)

    def other() -> Any:
        base: Any = VIT.model()
        with torch.no_grad():
            base.classifier.bias[0] += 1e-3
        return base

    with pytest.warns(UserWarning, match="fingerprint float32:.*not tuned") as caught:
        load(door, other(), tmp_path)
    assert len([each for each in caught if "fingerprint" in str(each.message)]) == 1
    with pytest.raises(SurgicalError, match="not tuned"):
        load(door, other(), tmp_path, strict_base=True)


@pytest.mark.parametrize("name", ["resnet", "levit"])
def test_frozen_statistics_count_too(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    saved(tmp_path, family.model(), blocks=[family.first])
    PeftModel.from_pretrained(family.model(), tmp_path, strict_base=True)
    base = family.model()
    next(buffer for key, buffer in reversed([*base.named_buffers()]) if key.endswith("running_var")).mul_(2)
    with pytest.raises(SurgicalError, match="not tuned"):
        PeftModel.from_pretrained(base, tmp_path, strict_base=True)


def test_where_nothing_is_frozen_there_is_nothing_to_compare(tmp_path: Path) -> None:
    config = saved(tmp_path, blocks="all")
    assert config["frozen_fingerprint"] is None
    PeftModel.from_pretrained(VIT.model(), tmp_path, strict_base=True)


@pytest.mark.parametrize("blocks", [[0], "1:"])
def test_a_second_adapter_is_compared_with_the_base_below_the_first(blocks: Any, tmp_path: Path) -> None:
    theirs = saved(tmp_path, blocks=[1])["frozen_fingerprint"]
    model = nudge(get_peft_model(VIT.model(), SurgicalConfig(blocks=blocks)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.load_adapter(tmp_path, "second")
    model.add_adapter("third", SurgicalConfig(blocks=[1]))
    assert model.peft_config["third"].frozen_fingerprint == theirs is not None


@pytest.mark.parametrize("strict", [False, True])
def test_an_earlier_version_compared_what_is_tuned(strict: bool, tmp_path: Path) -> None:
    config = saved(tmp_path, blocks=[0])
    later = ("new_weights", "frozen_fingerprint")
    (tmp_path / CONFIG).write_text(json.dumps({name: config[name] for name in config if name not in later}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(VIT.model(), tmp_path, strict_base=strict)
    assert any("earlier version" in str(each.message) for each in caught) is strict
    with pytest.raises(SurgicalError, match="tuned blocks"):
        PeftModel.from_pretrained(changed(VIT.model()), tmp_path, strict_base=True)


@pytest.mark.parametrize("door", DOORS)
def test_another_base_warns_with_both(door: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, blocks=[0, 11])["fingerprint"]
    ours = saved(tmp_path / "other", changed(VIT.model()), blocks=[0, 11])["fingerprint"]
    with pytest.warns(UserWarning, match=f"fingerprint {theirs}.*has {ours}") as caught:
        model = load(door, changed(VIT.model()), tmp_path)
    assert len([each for each in caught if "fingerprint" in str(each.message)]) == 1
    model.save_pretrained(tmp_path / "again")
    name = "again/second" if door == "PeftModel.load_adapter" else "again"
    assert json.loads((tmp_path / name / CONFIG).read_text())["fingerprint"] == theirs  # it was made from that one


@pytest.mark.parametrize("door", DOORS)
def test_another_base_is_refused_if_strict(door: str, tmp_path: Path) -> None:
    saved(tmp_path, blocks=[0, 11])
    base = changed(VIT.model())
    with pytest.raises(SurgicalError, match=r"fingerprint float32:.*has float32:"):
        load(door, base, tmp_path, strict_base=True)
    wrapped = {"5"} if door == "PeftModel.load_adapter" else set()
    owners = [name for name, module in base.named_modules() if "surgical_" in module._modules]
    assert {name.split("layers.")[1].split(".")[0] for name in owners} == wrapped


def test_another_dtype_may_be_all(tmp_path: Path) -> None:
    saved(tmp_path, blocks=[0])
    with pytest.warns(UserWarning, match="float32:.*bfloat16:.*dtype"):
        PeftModel.from_pretrained(VIT.model().bfloat16(), tmp_path)


@pytest.mark.parametrize("lost", ["in the file", "in the base"])
def test_what_cannot_be_compared_is_refused_only_if_strict(lost: str, tmp_path: Path) -> None:
    config = saved(tmp_path, blocks=[0])
    base = VIT.model()
    if lost == "in the file":
        del config["fingerprint"]
        (tmp_path / CONFIG).write_text(json.dumps(config))
    else:
        base = base.to("meta")
    message = "has no fingerprint" if lost == "in the file" else "cannot be read yet"
    with pytest.raises(SurgicalError, match=f"strict_base=True, but .*{message}"):
        PeftModel.from_pretrained(base, tmp_path, strict_base=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="for .*: copying from a non-meta parameter")  # torch's
        model = PeftModel.from_pretrained(base, tmp_path)
    assert model.peft_config["default"].fingerprint == config.get("fingerprint")


def test_being_strict_is_not_saved_and_not_for_the_file_to_say(tmp_path: Path) -> None:
    config = saved(tmp_path, blocks=[0], strict_base=True)
    assert "strict_base" not in config
    (tmp_path / CONFIG).write_text(json.dumps({**config, "strict_base": False}))
    with pytest.raises(SurgicalError, match="fingerprint"):
        PeftModel.from_pretrained(changed(VIT.model()), tmp_path, strict_base=True)
