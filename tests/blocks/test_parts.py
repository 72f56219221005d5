"""Parts of a layer have one name in every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError
from surgical_peft.blocks.module_lists import within
from surgical_peft.blocks.parts import PARTS, Layers, Part, parts_of, stacked, whole_or_rows
from surgical_peft.blocks.unwrap import named_bare_modules
from surgical_peft.tuner.target_modules import modules_to_tune
from tests.support.families import FAMILIES
from tests.support.mixtures import MIXTURES
from tests.support.vision_language import qwen2_vl
from tests.support.wrapping import logits, nudge, trainable

# What the last layer of each family holds: attention, feed-forward net, and the projections of attention.
FOUR = ("q", "k", "v", "o")
LLAMA = (["self_attn"], ["mlp"], [f"self_attn.{letter}_proj" for letter in FOUR])
VIT = (["attention"], ["mlp"], [f"attention.{letter}_proj" for letter in FOUR])
LAYERS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "vit": VIT,
    "swin": VIT,
    "bert": (
        ["attention"],
        ["intermediate", "output"],
        [*(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense"],
    ),
    "llama": LLAMA,
    "llama_tied": LLAMA,
    "qwen3_moe": LLAMA,
    "gpt2": (["attn"], ["mlp"], ["attn.c_proj"]),
    "modernbert": (["attn"], ["mlp"], ["attn.Wo"]),
    "t5": (
        ["layer.0.SelfAttention", "layer.1.EncDecAttention"],
        ["layer.2.DenseReluDense"],
        [
            f"layer.{at}.{name}.{letter}"
            for letter in FOUR
            for at, name in enumerate(("SelfAttention", "EncDecAttention"))
        ],
    ),
    "albert": (
        ["albert_layers.0.attention"],
        ["albert_layers.0.ffn", "albert_layers.0.ffn_output"],
        [f"albert_layers.0.attention.{name}" for name in ("query", "key", "value", "dense")],
    ),
    "levit": ([], ["module"], []),  # its attention is the layer before
    "clip": (["self_attn"], ["mlp"], [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]),
    "whisper": (
        ["self_attn", "encoder_attn"],
        ["fc1", "fc2"],
        [f"{home}.{name}_proj" for name in ("q", "k", "v", "out") for home in ("self_attn", "encoder_attn")],
    ),
    **{name: ([], [], []) for name in ("convnext", "resnet", "mamba")},
}
FUSED = {"gpt2": "c_attn", "modernbert": "Wqkv"}


def last_layer(model: nn.Module) -> tuple[Layers, str]:
    blocks = BlockMap.find(model)
    (home,) = blocks.modules[blocks.layers[-1]]
    modules = {path: module for path, module in named_bare_modules(model) if within(path, [home])}
    return Layers(modules, frozenset([home])), f"{home}."


def found(layers: Layers, name: str, home: str) -> list[str]:
    return [path.removeprefix(home) for path in layers.find(Part.read(name), name)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_parts_of_every_family(family: str) -> None:
    with torch.device("meta"):
        layers, home = last_layer(FAMILIES[family].build())
    attention, mlp, projections = LAYERS[family]
    assert found(layers, "attention", home) == attention
    assert found(layers, "mlp", home) == mlp
    letters = [letter for letter in FOUR if letter == "o" or family not in FUSED]
    assert [path for letter in letters for path in found(layers, f"attention.{letter}", home)] == projections
    is_mixture = family == "qwen3_moe"
    assert found(layers, "experts", home) == ["mlp.experts"] * is_mixture
    assert found(layers, "router", home) == ["mlp.gate"] * is_mixture
    assert layers.existing() == [name for name in PARTS if found(layers, name, home)]
    assert parts_of(FAMILIES[family].build(), [home.rstrip(".")]) == layers.existing()


@pytest.mark.parametrize("family", list(FUSED))
def test_a_projection_that_is_fused_with_others_is_refused_with_what_there_is(family: str) -> None:
    with pytest.raises(SurgicalError, match=FUSED[family]):
        get_peft_model(FAMILIES[family].model(), SurgicalConfig(blocks=[0], target_modules=["attention.q"]))


@pytest.mark.parametrize("name", list(MIXTURES))
def test_the_router_and_the_experts_of_every_mixture(name: str) -> None:
    model = MIXTURES[name].model()
    layers, _ = last_layer(model)
    (experts,), (router,) = layers.experts(), layers.router()
    assert experts.endswith(".experts") and router.rpartition(".")[0] == experts.rpartition(".")[0]
    assert layers.mlp() == [experts.rpartition(".")[0]]
    count = stacked(model.get_submodule(experts))
    assert count == (None if name == "nllb_moe" else 4)
    assert layers.find(Part.read("experts[:]"), "experts[:]").keys() == (
        {experts} if count else {f"{experts}.expert_{at}" for at in range(4)}
    )


def tuned(model: nn.Module, **settings: Any) -> dict[str, set[str] | None]:
    return modules_to_tune(model, SurgicalConfig(**settings))


def test_one_name_for_both_towers() -> None:
    with torch.device("meta"):
        model = qwen2_vl()
    paths = tuned(model, blocks=["vision", "language"], target_modules=["attention"])
    assert len(paths) == 9 and {path.rpartition(".")[2] for path in paths} == {"attn", "self_attn"}
    with pytest.raises(SurgicalError, match="qkv"):
        tuned(model, blocks=["vision"], target_modules=["attention.q"])
    assert len(tuned(model, blocks=["language"], target_modules=["attention.q", "attention.v"])) == 8


def test_a_name_that_modules_have_stands_for_them() -> None:
    assert list(tuned(FAMILIES["bert"].model(), blocks=[0], target_modules=["attention"])) == [
        "bert.encoder.layer.0.attention"
    ]
    both = tuned(FAMILIES["bert"].model(), blocks=[0], target_modules=["query", "mlp"])
    assert [path.rpartition("layer.0.")[2] for path in both] == ["attention.self.query", "intermediate", "output"]


@pytest.mark.parametrize("choice", ["attention", ["attention"], {"0": "attention"}, {"0": ["attention"]}])
def test_a_part_is_said_alone_in_a_list_or_for_each_block(choice: Any) -> None:
    model = get_peft_model(FAMILIES["llama"].model(), SurgicalConfig(blocks=["0"], target_modules=choice))
    assert trainable(model) and all(".layers.0.self_attn." in name for name in trainable(model))


def test_excluded_modules_are_left_out_of_parts() -> None:
    settings = {"blocks": [0], "target_modules": ["attention"], "exclude_modules": ["q_proj"]}
    paths = tuned(FAMILIES["llama"].model(), **settings)
    assert [path.rpartition(".")[2] for path in paths] == ["k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    ("family", "part", "why"),
    [
        ("llama", "experts", "'experts' matches no module.*attention, mlp"),
        ("llama", "experts[0]", "'experts.0.' matches no module.*attention, mlp"),
        ("llama", "router", "'router' matches no module"),
        ("mamba", "attention", "'attention' matches no module.*none"),
        ("convnext", "mlp", "'mlp' matches no module"),
        ("llama", ["mlp", "self_atn"], "'self_atn' matches no module.*self_attn"),
    ],
)
def test_a_part_that_does_not_exist_is_refused_with_those_that_do(family: str, part: Any, why: str) -> None:
    with pytest.raises(SurgicalError, match=why):
        tuned(FAMILIES[family].model(), blocks="all", target_modules=part)


def test_a_part_without_blocks_asks_for_them() -> None:
    with pytest.raises(SurgicalError, match="blocks='all'"):
        tuned(FAMILIES["qwen3_moe"].model(), target_modules=["experts[0]"])


def test_what_is_whole_has_no_rows_beside_it() -> None:
    rows = {"0.mlp.experts": {"up[3]"}}
    assert whole_or_rows({"0.mlp": None}, rows) == {"0.mlp": None}
    assert whole_or_rows({"0.attn": None}, rows) == {"0.attn": None, **rows}


def test_a_saved_choice_with_a_name_that_matched_nothing_loads_as_it_was_trained(tmp_path: Path) -> None:
    """Versions without names of parts passed over `mlp` in BERT."""
    model = nudge(get_peft_model(FAMILIES["bert"].model(), SurgicalConfig(blocks=[0], target_modules=["query"])))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ["query", "mlp", "nope"]}))
    loaded = PeftModel.from_pretrained(FAMILIES["bert"].model(), tmp_path).eval()
    batch = FAMILIES["bert"].batch()
    assert torch.equal(logits(loaded, batch), logits(model.eval(), batch))
