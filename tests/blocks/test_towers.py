"""Towers by the names that people ask for, in models of every kind of tower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgical_peft import BlockMap, SurgicalError
from surgical_peft.blocks.towers import names_of_towers, projector_in, tower_blocks
from tests.support.families import FAMILIES
from tests.support.vision_language import qwen2_vl


def blocks_of(model: nn.Module) -> BlockMap:
    return BlockMap.find(model)


def test_the_towers_of_a_vision_language_model_and_its_projector_are_apart_and_all_of_it() -> None:
    with torch.device("meta"):
        blocks = blocks_of(qwen2_vl())
    vision, projector, language = (blocks.parse(name) for name in ("vision", "projector", "language"))
    assert vision == ("visual.embeddings", "visual.0", "visual.1", "visual.2", "visual.3", "visual.4")
    assert projector == ("visual.final_norm", "visual.head")  # the merger
    assert all("merger" in path for name in projector for path in blocks.modules[name])
    assert sorted([*vision, *projector, *language]) == sorted(blocks.names)
    assert blocks.parse("visual") == (*vision, *projector)  # the tower by its own name has all that is in it
    names = names_of_towers(blocks.modules)
    assert set(names) == {"visual", "language_model", "vision", "projector", "language"}
    assert all(blocks.parse(name) for name in names)


def test_the_head_of_a_language_model_belongs_to_its_tower() -> None:
    modules = {"embeddings": ["projector"], "vision.0": ["v"], "language_model.0": ["l"], "head": ["lm_head"]}
    assert tower_blocks("language", modules) == ("language_model.0", "head")
    assert tower_blocks("language", {**modules, "head": ["classifier"]}) == ("language_model.0",)
    assert tower_blocks("vision", modules) == ("vision.0",)


@pytest.mark.parametrize(
    ("family", "tower", "count"),
    [
        ("clip", "vision", 5),
        ("clip", "language", 4),
        ("clip", "projector", 1),
        ("t5", "encoder", 3),
        ("whisper", "decoder", 5),
        ("swin", "stages.1", 3),  # its downsampling, too
        ("swin", "stages", 5),
    ],
)
def test_a_tower_has_all_its_blocks(family: str, tower: str, count: int) -> None:
    blocks = blocks_of(FAMILIES[family].model())
    chosen = blocks.parse(tower)
    assert len(chosen) == count, chosen
    assert blocks.parse([tower]) == chosen
    repeated = {name for name in chosen if blocks.kind(name) == "layer"}
    assert repeated == {name for name in chosen if name in blocks.layers}


def test_a_projector_that_shares_its_block_is_refused_with_its_modules() -> None:
    modules = {"embeddings": ("image_newline", "multi_modal_projector"), "vision.0": ("v",), "language.0": ("l",)}
    assert projector_in(modules) == {"embeddings": ["multi_modal_projector"]}
    stacks = {"vision": ("vision.0",), "language": ("language.0",)}
    blocks = BlockMap(tuple(modules), modules, stacks, {}, "Llava")
    with pytest.raises(SurgicalError, match="multi_modal_projector"):
        blocks.parse("projector")


@pytest.mark.parametrize("tower", ["vision", "projector", "language", "encoder", "decoder"])
@pytest.mark.parametrize("family", ["llama", "swin"])
def test_a_tower_that_does_not_exist_is_refused_with_those_that_do(family: str, tower: str) -> None:
    blocks = blocks_of(FAMILIES[family].model())
    with pytest.raises(SurgicalError, match=f"'{tower}' does not exist.*{blocks.names[0]}") as raised:
        blocks.parse(tower)
    assert "stages.1" in str(raised.value) or family == "llama"


def test_a_tower_and_a_block_of_it_is_the_same_block_twice() -> None:
    blocks = blocks_of(FAMILIES["whisper"].model())
    with pytest.raises(SurgicalError, match=r"encoder\.0"):
        blocks.parse(["encoder", "encoder[0]"])
