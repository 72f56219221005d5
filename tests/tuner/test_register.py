from __future__ import annotations

import importlib
from typing import Any

import pytest
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import surgical_peft
from surgical_peft import SurgicalConfig, SurgicalError, SurgicalModel
from surgical_peft.tuner import register as registration
from surgical_peft.tuner.config import SurgicalPeftType
from tests.support.toys import Toy

MAPPINGS: tuple[dict[Any, Any], ...] = (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
)
OURS = [SurgicalConfig, SurgicalModel, "surgical_"]


def foreign(key: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another package had registered, and ours not yet."""
    other = type("OtherModel", (), {"__module__": "other_package"})
    for mapping, value in zip(MAPPINGS, (object, other, prefix), strict=True):
        monkeypatch.delitem(mapping, SurgicalPeftType.SURGICAL)
        monkeypatch.setitem(mapping, key, value)


def test_importing_the_package_registers_the_method() -> None:
    assert [mapping[SurgicalPeftType.SURGICAL] for mapping in MAPPINGS] == OURS
    assert [mapping["SURGICAL"] for mapping in MAPPINGS] == OURS  # as PEFT looks it up, by the string in the file


def test_registering_again_changes_nothing() -> None:
    before = [dict(mapping) for mapping in MAPPINGS]
    registration.register()
    importlib.reload(registration).register()
    importlib.reload(surgical_peft)
    assert [dict(mapping) for mapping in MAPPINGS] == before


def test_a_fresh_import_of_the_package_takes_the_place_of_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook that reloaded the modules was told that the method clashes with itself."""
    old = type("SurgicalModel", (), {"__module__": SurgicalModel.__module__})
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, SurgicalPeftType.SURGICAL, old)
    registration.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[SurgicalPeftType.SURGICAL] is SurgicalModel


@pytest.mark.parametrize(("key", "prefix"), [("SURGICAL", "other_"), ("OTHER", "surgical_")])
def test_a_clash_is_refused_with_both_names(key: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(key, prefix, monkeypatch)
    before = [dict(mapping) for mapping in MAPPINGS]
    with pytest.raises(SurgicalError, match=r"other_package\.OtherModel.*surgical_peft\.tuner\.model\.SurgicalModel"):
        registration.register()
    assert [dict(mapping) for mapping in MAPPINGS] == before


def test_peft_makes_our_config_from_a_name() -> None:
    config = PeftConfig.from_peft_type(peft_type="SURGICAL", blocks=[0])
    assert type(config) is SurgicalConfig


def test_status_and_counts_are_told(vit: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(vit.model(), SurgicalConfig(blocks=[0], modules_to_save=["classifier"]))
    layers, status = model.get_layer_status(), model.get_model_status()
    *ours, head = layers
    assert all(layer.name.startswith("model.vit.layers.0.") and layer.name.endswith(".surgical_") for layer in ours)
    assert head.name == "model.classifier"
    for layer in ours:
        assert layer.module_type == "surgical.SurgicalLayer" or "SurgicalLayer" in layer.module_type
        assert layer.requires_grad == {"default": True} and layer.available_adapters == ["default"]
    assert status.peft_types == {"default": "SURGICAL"}
    assert status.adapter_model_type == "SurgicalModel" and status.num_adapter_layers == len(layers) > 2
    tuned = sum(p.numel() for m in (vit.model().vit.layers[0], vit.model().classifier) for p in m.parameters())
    assert status.trainable_params == tuned
    model.print_trainable_parameters()
    assert f"trainable params: {tuned:,}" in capsys.readouterr().out
