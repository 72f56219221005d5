"""`SurgicalConfig(layers=...)`: what it goes with, and that all adapters of a model have the same blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from surgical_peft import (
    BlockMap,
    Selection,
    SurgicalConfig,
    SurgicalError,
    create_surgical_optimizer,
    get_surgical_model,
    policies,
    score_blocks,
    top_k,
)
from surgical_peft.tuner.target_modules import modules_to_tune
from tests.support.unusual import UNUSUAL, Unusual


@pytest.fixture(params=UNUSUAL, name="unusual")
def _unusual(request: pytest.FixtureRequest) -> Unusual:
    return UNUSUAL[request.param]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_modules": ["stem"]}, "blocks='all'"),
        ({"blocks": [0], "layers": ""}, "names no layers"),
        ({"blocks": [0], "layers": []}, "names no layers"),
        ({"blocks": [0], "layers": 3}, "3"),
        ({"blocks": [0], "layers": ["../body"]}, "../body"),
    ],
)
def test_refused_at_once(settings: dict, why: str) -> None:
    with pytest.raises(SurgicalError) as raised:
        SurgicalConfig(**{"layers": "body", **settings})
    assert why in str(raised.value)


def test_a_path_that_the_model_does_not_have_leaves_model_and_config_alone() -> None:
    model, config = UNUSUAL["attributes"].model(), SurgicalConfig(blocks=[0], layers="bodi")
    with pytest.raises(SurgicalError, match="'body'"):
        get_peft_model(model, config)
    assert (config.blocks, config.layers) == ([0], "bodi")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_inside_the_blocks_of_named_layers() -> None:
    config = SurgicalConfig(blocks=["writer[0]", "writer[1]"], layers=UNUSUAL["lists"].layers, target_modules=["1"])
    assert list(modules_to_tune(UNUSUAL["lists"].model(), config)) == ["writer.parts.1"]


def test_another_adapter_takes_over_the_layers(unusual: Unusual, tmp_path: Path) -> None:
    model = get_peft_model(unusual.model(), SurgicalConfig(blocks=[unusual.first], layers=unusual.layers))
    model.add_adapter("other", SurgicalConfig(blocks=[unusual.last]))
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(unusual.model(), tmp_path / "other")
    assert BlockMap.find(alone) == BlockMap.find(model)


@pytest.mark.parametrize(("first", "second"), [("body", "body.gate*"), (None, "body"), ("body", ["body", "head*"])])
def test_adapters_of_other_layers_are_refused(first: str | None, second: str | list[str]) -> None:
    model = UNUSUAL["named"].model()
    if first is None:  # so that there is something to be found
        model.body = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    model = get_peft_model(model, SurgicalConfig(blocks=[0], layers=first))
    with pytest.raises(SurgicalError, match="default"):
        model.add_adapter("other", SurgicalConfig(blocks="all", layers=second))
    assert list(model.peft_config) == ["default"]


def test_blocks_that_scores_chose_bring_their_layers(unusual: Unusual) -> None:
    model = unusual.model()
    scores = score_blocks(model, [unusual.batch()], blocks=BlockMap.from_layers(model, unusual.layers))
    assert set(scores.values) == set(unusual.blocks)
    selection = top_k(type(scores).from_json(scores.to_json()), 2)
    config = SurgicalConfig.from_selection(selection)
    assert BlockMap.find(get_peft_model(model, config)).names == unusual.blocks
    with pytest.raises(SurgicalError, match="stem"):
        SurgicalConfig.from_selection(selection, layers="stem")


def test_scores_of_an_earlier_version_are_read() -> None:
    scores = score_blocks(
        UNUSUAL["named"].model(),
        [UNUSUAL["named"].batch()],
        blocks=BlockMap.from_layers(UNUSUAL["named"].model(), "body"),
    )
    old = scores.to_json().replace('"layer_paths"', '"unscored"')  # a key twice: the last one counts
    assert type(scores).from_json(old).layer_paths == ()
    assert SurgicalConfig.from_selection(Selection(("head",))).layers is None


@pytest.mark.parametrize("criterion", ["rgn", None])  # None: the probe, and joint trainings
def test_auto_chooses_among_the_named_layers(criterion: str | None, unusual: Unusual) -> None:
    config = SurgicalConfig(blocks="auto", criterion=criterion, layers=unusual.layers)
    model = get_surgical_model(unusual.model(), config, [unusual.batch(seed) for seed in range(3)])
    assert set(model.peft_config["default"].blocks) <= set(unusual.blocks)


def test_policies_know_the_named_layers(unusual: Unusual) -> None:
    model = get_peft_model(unusual.model(), SurgicalConfig(blocks="all", layers=unusual.layers))
    optimizer = create_surgical_optimizer(model, torch.optim.SGD, lr=1.0, policy=policies.layer_decay(0.5))
    factors = {group["block"]: group["base_multiplier"] for group in optimizer.param_groups}
    depths = BlockMap.find(model).depths
    assert factors == {name: 0.5 ** (max(depths.values()) - depths[name]) for name in unusual.blocks}


def test_a_file_without_layers_is_of_layers_that_are_found(tmp_path: Path) -> None:
    SurgicalConfig(blocks=[0]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"layers"' not in line))
    assert PeftConfig.from_pretrained(str(tmp_path)).layers is None
