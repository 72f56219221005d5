"""The block map: the names, the partition through every wrapper, and the grammar of `parse`."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTModel,
)

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError
from surgical_peft.blocks.unwrap import bare_parameter_name, idle_parameters
from tests.support.toys import TOYS, Toy
from tests.support.wrapping import assert_partition

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}


class FSDPLike(nn.Module):
    """Stands where FSDP1 puts itself, at the root and around each layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def lora(model: nn.Module, **kwargs: object) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, **kwargs))


def surgical(model: nn.Module, toy: Toy, keep_base: str = "device") -> nn.Module:
    return peft.get_peft_model(model, SurgicalConfig(blocks=[toy.first, toy.last], keep_base=keep_base))


def wrap_layers(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Put every repeated layer of the model into a wrapper, as FSDP and activation checkpointing do."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for index, layer in enumerate(module):
                module[index] = wrap(layer)
    return model


CONTAINERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "data_parallel": nn.DataParallel,
    "compiled": torch.compile,
    "fsdp": FSDPLike,
    "compiled_fsdp_layers": lambda model: torch.compile(FSDPLike(wrap_layers(model, FSDPLike))),
    "data_parallel_compiled": lambda model: nn.DataParallel(torch.compile(model)),
    "checkpointed_layers": lambda model: wrap_layers(model, checkpoint_wrapper),
}


def test_names_of_every_family(toy: Toy) -> None:
    assert BlockMap.find(toy.model()).names == toy.blocks


def test_every_parameter_is_in_exactly_one_block(toy: Toy) -> None:
    model = toy.model()
    assert_partition(BlockMap.find(model), model)


def test_no_block_is_empty(toy: Toy) -> None:
    model = toy.model()
    assert all(BlockMap.find(model).parameters(model).values())


def test_modules_of_a_block_hold_exactly_its_parameters(toy: Toy) -> None:
    model = toy.model()
    blocks = BlockMap.find(model)
    for block, named in blocks.named_parameters(model).items():
        paths = blocks.modules[block]
        assert all(any(name == path or name.startswith(path + ".") for path in paths) for name in named)
        assert sum(len(list(model.get_submodule(path).parameters())) for path in paths) == len(named)


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "qwen3_moe"])  # PEFT's wrapper refuses tied weights
def test_peft_model_has_the_map_of_its_base(name: str) -> None:
    toy = TOYS[name]
    bare = BlockMap.find(toy.model())
    for model in (surgical(toy.model(), toy), surgical(toy.model(), toy, "none"), lora(toy.model())):
        assert BlockMap.find(model) == bare
        assert_partition(bare, model)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_lora_over_a_tied_model_is_partitioned(name: str) -> None:
    model = lora(TOYS[name].model())
    assert BlockMap.find(model).names == TOYS[name].blocks
    assert_partition(BlockMap.find(model), model)


def test_new_parameters_beside_a_tied_weight_go_to_its_block() -> None:
    """`lm_head` of a tied model has no weight of its own, and what PEFT put there belonged to no block."""
    model = peft.get_peft_model(
        TOYS["gpt2"].model(), peft.LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"])
    )
    blocks = BlockMap.find(model)
    assert_partition(blocks, model)
    assert blocks.block_of("lm_head.lora_A.default.weight") == "embeddings"


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_change_neither_names_nor_partition(container: str, toy: Toy) -> None:
    bare = BlockMap.find(toy.model())
    model = CONTAINERS[container](toy.model())
    assert BlockMap.find(model) == bare
    assert_partition(bare, model)


@pytest.mark.parametrize("container", ["data_parallel", "compiled", "fsdp", "data_parallel_compiled"])
def test_containers_around_and_inside_a_peft_model(container: str, vit: Toy) -> None:
    bare = BlockMap.find(vit.model())
    for model in (
        CONTAINERS[container](surgical(vit.model(), vit)),
        CONTAINERS[container](lora(vit.model())),
        lora(CONTAINERS[container](vit.model())),
    ):
        assert BlockMap.find(model) == bare
        assert_partition(bare, model)


def test_a_container_above_the_stack_is_seen_through() -> None:
    """An inner container stayed in the map's paths but not in the cleaned names, which then belonged to no block."""
    model = TOYS["bert"].model()
    bare = BlockMap.find(model)
    model.bert.encoder = FSDPLike(model.bert.encoder)
    assert BlockMap.find(model) == bare
    assert_partition(bare, model)


def test_a_wrapper_above_the_stack_is_seen_through() -> None:
    """With the whole encoder tuned as one module, the copy's names belonged to no block."""
    model = TOYS["bert"].model()
    bare = BlockMap.find(model)
    model = peft.get_peft_model(model, SurgicalConfig(target_modules=["bert.encoder"]))
    assert BlockMap.find(model) == bare
    assert_partition(bare, model)


@pytest.mark.parametrize("index", ["1", "10", "11"])
def test_block_of_is_anchored(index: str, vit: Toy) -> None:
    blocks = BlockMap.find(vit.model())
    assert blocks.block_of(f"vit.layers.{index}.attention.q_proj.weight") == index
    assert blocks.block_of(f"vit.layers.{index}") == index


@pytest.mark.parametrize(
    "name",
    [
        "vit.layers.1.mlp.fc1.weight",
        "module.vit.layers.1.mlp.fc1.weight",
        "_orig_mod.module.vit.layers.1.mlp.fc1.weight",
        "module._orig_mod.base_model.model.vit.layers.1.mlp.fc1.weight",
        "base_model.model._orig_mod.vit.layers.1._checkpoint_wrapped_module.mlp.fc1.weight",
        "_fsdp_wrapped_module.base_model._fsdp_wrapped_module.model.vit.layers.1._fsdp_wrapped_module.mlp.fc1.weight",
        "base_model.model.vit.layers.1.mlp.fc1.surgical_.default.weight",
        "base_model.model.vit.layers.1.modules_to_save.module.mlp.fc1.weight",
        "base_model.model.vit.layers.1.base_layer.mlp.fc1.weight",
        "base_model.model.vit.layers.1.mlp.fc1.base_layer.weight",
        "vit.layers.1.modules_to_save.my_adapter.mlp.fc1.weight",
        "vit.layers.1.original_module.mlp.fc1.weight",
    ],
)
def test_wrappers_in_a_name_are_ignored(name: str, vit: Toy) -> None:
    assert bare_parameter_name(name) == "vit.layers.1.mlp.fc1.weight"
    assert BlockMap.find(vit.model()).block_of(name) == "1"


def test_what_lora_adds_lies_in_the_block_of_its_module(vit: Toy) -> None:
    blocks = BlockMap.find(vit.model())
    assert blocks.block_of("base_model.model.vit.layers.10.attention.q_proj.lora_A.default.weight") == "10"
    assert blocks.block_of("classifier.modules_to_save.default.weight") == "head"


@pytest.mark.parametrize("name", ["vit.layers.12.mlp.fc1.weight", "vit", "nothing.weight", "vit.layers.1x.weight", ""])
def test_block_of_a_name_in_no_block(name: str, vit: Toy) -> None:
    with pytest.raises(SurgicalError) as raised:
        BlockMap.find(vit.model()).block_of(name)
    assert repr(name) in str(raised.value) and "embeddings, 0, 1" in str(raised.value)


def test_idle_parameters_are_what_nothing_uses(vit: Toy) -> None:
    model = surgical(vit.model(), vit)

    def idle_names() -> set[str]:
        return {name for name, parameter in model.named_parameters() if id(parameter) in idle_parameters(model)}

    assert idle_names() == set()  # what is parked is not among the parameters
    with model.disable_adapter():
        assert idle_names() == set()
    model.add_adapter(
        "other", SurgicalConfig(blocks=[vit.first], lora=peft.LoraConfig(target_modules=["layers.5.mlp.fc1"]))
    )
    assert idle_names() and all(".lora_" in name for name in idle_names())


ALL = TOYS["vit"].blocks
LAYERS = ALL[1:13]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (0, ("0",)),
        (-1, ("11",)),
        (-12, ("0",)),
        ("3", ("3",)),
        ("-2", ("10",)),
        ("0:3", ("0", "1", "2")),
        (":2", ("0", "1")),
        ("-2:", ("10", "11")),
        (":", LAYERS),
        ("0:12", LAYERS),
        ("::2", LAYERS[::2]),
        ("::-6", ("5", "11")),
        ("-4:-1:2", ("8", "10")),
        ("embeddings", ("embeddings",)),
        ("head", ("head",)),
        ("all", ALL),
        ([0, -1, "head"], ("0", "11", "head")),
        (["head", 3, "embeddings"], ("embeddings", "3", "head")),
        (["0:2", "-1"], ("0", "1", "11")),
        ((1, 10), ("1", "10")),
        (range(2), ("0", "1")),
    ],
)
def test_parse(spec: object, expected: tuple[str, ...], vit: Toy) -> None:
    assert BlockMap.find(vit.model()).parse(spec) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("encoder[0]", ("encoder.0",)),
        ("decoder[-1]", ("decoder.1",)),
        ("decoder[-2:]", ("decoder.0", "decoder.1")),
        ("encoder[:]", ("encoder.0", "encoder.1")),
        ("encoder.1", ("encoder.1",)),
        (["decoder[0]", "encoder[1:]", "embeddings"], ("embeddings", "encoder.1", "decoder.0")),
        ("all", TOYS["t5"].blocks),
    ],
)
def test_parse_with_two_stacks(spec: object, expected: tuple[str, ...]) -> None:
    assert BlockMap.find(TOYS["t5"].model()).parse(spec) == expected  # type: ignore[arg-type]


EXISTS = "embeddings, 0, 1, 2"
RANGE = "12 repeated blocks, 0 to 11"


@pytest.mark.parametrize(
    ("spec", "value", "why"),
    [
        ("encoder", "'encoder'", EXISTS),
        ("", "''", EXISTS),
        ("embedding", "'embedding'", EXISTS),
        ("1 0", "'1 0'", EXISTS),
        (12, "12", RANGE),
        (-13, "-13", RANGE),
        ("12", "'12'", RANGE),
        ("0:13", "'0:13'", RANGE),
        ("-13:", "'-13:'", RANGE),
        ("::0", "'::0'", RANGE),
        ("3:3", "'3:3'", RANGE),
        ("12:", "'12:'", RANGE),
        ([0, "5:2"], "'5:2'", RANGE),
        ([], "[]", EXISTS),
        ((), "()", EXISTS),
        ([0, "0"], "[0, '0']", "twice"),
        ([0, -12], "[0, -12]", "twice"),
        ([0, "0:3"], "[0, '0:3']", "twice"),
        (["all", "head"], "['all', 'head']", "twice"),
        ("encoder[0]", "'encoder[0]'", "no stack 'encoder'"),
        (True, "True", EXISTS),
        ([0, False], "False", EXISTS),
        (1.0, "1.0", EXISTS),
        ([1.5], "1.5", EXISTS),
        (None, "None", EXISTS),
        ([[0, 1]], "[0, 1]", EXISTS),
    ],
)
def test_parse_refuses(spec: object, value: str, why: str, vit: Toy) -> None:
    """A slice of nothing beside another block, and a float alone (a TypeError), were once let through."""
    with pytest.raises(SurgicalError) as raised:
        BlockMap.find(vit.model()).parse(spec)  # type: ignore[arg-type]
    assert value in str(raised.value) and why in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (0, "'encoder' (2 blocks) and 'decoder' (2 blocks)"),
        ("-2:", "'decoder[-2:]'"),
        (["encoder[0]", 1], "which stack"),
        ("middle[0]", "no stack 'middle'"),
        ("decoder[2]", "(decoder) has 2 repeated blocks, 0 to 1"),
        ("decoder[-3]", "(decoder) has 2 repeated blocks, 0 to 1"),
        ("decoder[0:3]", "(decoder) has 2 repeated blocks"),
        ("decoder[1:1]", "selects no block"),
        ("decoder[]", "brackets"),
        ("decoder[x]", "brackets"),
        ("middle", "'decoder[-2:]'"),
        (["decoder[0]", "decoder.0"], "named twice"),
    ],
)
def test_parse_with_two_stacks_refuses(spec: object, why: str) -> None:
    with pytest.raises(SurgicalError) as raised:
        BlockMap.find(TOYS["t5"].model()).parse(spec)  # type: ignore[arg-type]
    assert why in str(raised.value)


def test_the_head_of_a_tied_model_is_explained() -> None:
    with pytest.raises(SurgicalError, match=r"lm_head.*'embeddings'"):
        BlockMap.find(TOYS["gpt2"].model()).parse("head")


def test_a_model_without_repeated_layers_says_what_there_is() -> None:
    with pytest.raises(SurgicalError) as raised:
        BlockMap.find(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert "Sequential" in str(raised.value) and "0 (Linear), 1 (ReLU), 2 (Linear)" in str(raised.value)


def test_a_list_that_is_none_of_layers_is_listed() -> None:
    model = nn.Module()
    model.convs = nn.ModuleList([nn.Conv1d(1, 2, 3), nn.LSTM(2, 2)])
    with pytest.raises(SurgicalError, match=r"convs \(2 of Conv1d, LSTM\)"):
        BlockMap.find(model)


def test_a_single_layer_is_a_stack() -> None:
    model = ViTModel(ViTConfig(**{**SMALL, "num_hidden_layers": 1}), add_pooling_layer=False)
    assert BlockMap.find(model).names == ("embeddings", "0", "final_norm")


class Towers(nn.Module):
    """Two stacks of which one lies inside the other's tower, and with a label that also ends the path."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.embed = nn.Linear(2, 2)
        self.a.vision = nn.Module()
        self.a.vision.embed = nn.Linear(2, 2)
        self.a.vision.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.a.vision.norm = nn.LayerNorm(2)
        self.a.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.a.norm = nn.LayerNorm(2)


def test_the_parts_of_nested_towers_go_to_the_innermost() -> None:
    """A tower was found by searching its label in the path, and the first tower that matched was taken."""
    blocks = BlockMap.find(Towers())
    assert blocks.block_of("a.vision.embed") == "vision.embeddings"
    assert blocks.block_of("a.vision.norm") == "vision.final_norm"
    assert blocks.block_of("a.embed") == "embeddings"
    assert blocks.block_of("a.norm") == "final_norm"
    assert blocks.names[-3:] == ("layers.0", "layers.1", "final_norm")  # the outer one runs after what feeds it


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_a_part_of_the_model_may_be_called_module() -> None:
    """`module.` was cut out of every name, wherever it stood, and the rest then belonged to no block."""
    model = nn.Module()
    model.trunk = nn.Module()
    model.trunk.module = nn.ModuleList(Residual() for _ in range(2))
    model.classifier = nn.Linear(2, 2)
    blocks = BlockMap.find(nn.DataParallel(model))
    assert_partition(blocks, model)
    assert_partition(blocks, nn.DataParallel(model))
    assert blocks.block_of("trunk.module.1.module.weight") == "1"


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


LAYERS_3 = ("0", "1", "2")
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "vit_model": (lambda: ViTModel(ViTConfig(**SMALL)), ("embeddings", *LAYERS_3, "final_norm", "head")),
    "vit_without_pooler": (
        lambda: ViTModel(ViTConfig(**SMALL), add_pooling_layer=False),
        ("embeddings", *LAYERS_3, "final_norm"),
    ),
    "bert_model": (lambda: BertModel(BertConfig(**SMALL)), ("embeddings", *LAYERS_3, "head")),
    "bert_mlm": (lambda: BertForMaskedLM(BertConfig(**SMALL)), ("embeddings", *LAYERS_3, "head")),
    "llama_model": (
        lambda: LlamaModel(LlamaConfig(**SMALL, vocab_size=24)),
        ("embeddings", *LAYERS_3, "final_norm"),
    ),
    "swin": (
        lambda: SwinForImageClassification(SwinConfig(embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 2])),
        (
            "embeddings",
            "stages.0.0",
            *("stages.1.embeddings", "stages.1.0", "stages.1.1"),
            *("stages.2.embeddings", "stages.2.0"),
            *("final_norm", "head"),
        ),
    ),
    "dinov2": (
        lambda: Dinov2ForImageClassification(Dinov2Config(hidden_size=16, num_attention_heads=2, num_hidden_layers=3)),
        ("embeddings", *LAYERS_3, "final_norm", "head"),
    ),
    "clip": (
        lambda: CLIPModel(CLIPConfig(text_config=dict(SMALL), vision_config=dict(SMALL))),
        (
            "embeddings",
            *(f"text_model.{kind}" for kind in ("embeddings", *LAYERS_3, "final_norm")),
            *(f"vision_model.{kind}" for kind in ("embeddings", *LAYERS_3, "final_norm")),
            "head",
        ),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str) -> None:
    build, names = OTHERS[name]
    model = on_meta(build)
    blocks = BlockMap.find(model)
    assert blocks.names == names
    assert_partition(blocks, model)


@pytest.mark.parametrize("name", OTHERS)
def test_weights_that_zero_3_has_dealt_out_have_the_same_map(name: str) -> None:
    model = on_meta(OTHERS[name][0])
    blocks = BlockMap.find(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # as DeepSpeed leaves them
        parameter.data = torch.empty(0, device="meta")
    assert BlockMap.find(model) == blocks


def test_a_norm_inside_the_head_belongs_to_the_head() -> None:
    """BERT's prediction head normalizes between two linear maps: this was taken for the norm after the layers."""
    blocks = BlockMap.find(on_meta(OTHERS["bert_mlm"][0]))
    assert blocks.block_of("cls.predictions.transform.LayerNorm.weight") == "head"
    assert blocks.block_of("cls.predictions.decoder.weight") == "embeddings"  # tied


@pytest.mark.parametrize("kind", ["deberta-v2", "mpnet"])
def test_relative_positions_are_embeddings_though_declared_after_the_layers(kind: str) -> None:
    """DeBERTa's and MPNet's position embeddings were put into the head."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    extra = {"relative_attention": True, "position_buckets": 4} if kind == "deberta-v2" else {}
    config = AutoConfig.for_model(kind, vocab_size=20, max_position_embeddings=16, **small, **extra)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    blocks = BlockMap.find(model)
    assert any("rel" in module for module in blocks.modules["embeddings"])
    assert not any("rel" in module for module in blocks.modules["head"])


def test_a_divided_map_has_parts_in_place_of_layers() -> None:
    whole = BlockMap.find(TOYS["t5"].model())
    parts = whole.divided(["a", "b"])
    assert parts.parse("decoder[0:3]") == ("decoder.0/a", "decoder.0/b", "decoder.1/a")
    assert [name for name in parts.names if "/" not in name] == [
        name for name in whole.names if name.split(".")[-1] not in ("0", "1")
    ]
    for wrong in ([], ["a", "a"]):
        with pytest.raises(SurgicalError, match="divide"):
            whole.divided(wrong)


def test_facts_of_a_map() -> None:
    t5 = BlockMap.find(TOYS["t5"].model())
    assert [t5.kind(name) for name in ("embeddings", "encoder.0", "decoder.final_norm")] == [
        *("embeddings", "layer", "final_norm")
    ]
    assert t5.layers == ("encoder.0", "encoder.1", "decoder.0", "decoder.1")
    assert t5.depths["encoder.final_norm"] == t5.depths["decoder.0"] == 3
    assert (t5.tower_of("decoder.final_norm"), t5.tower_of("embeddings")) == ("decoder", "")
    vit = BlockMap.find(TOYS["vit"].model())
    assert (vit.heads, vit.poolers) == (("head",), ())
    bare = BlockMap.find(ViTModel(ViTConfig(**SMALL)))
    assert bare.heads == bare.poolers == ("head",)
    with pytest.raises(SurgicalError, match="'embeddings'"):
        vit.kind("embedding")


def test_a_part_of_a_layer_is_one_whatever_it_is_called() -> None:
    """A part called `mlp.head` made its layer a head."""
    blocks = BlockMap.find(TOYS["vit"].model()).divided(["mlp.head", "final_norm"])
    assert {blocks.kind(name) for name in blocks.layers} == {"layer"}
    assert blocks.heads == ("head",)


@pytest.mark.parametrize("part", ["9" * 5000, "-" + "9" * 5000, "9" * 5000 + ":", "::" + "9" * 5000], ids=range(4))
def test_numbers_that_no_block_has(part: str, vit: Toy) -> None:
    """Python turns at most 4,300 digits into a number."""
    with pytest.raises(SurgicalError, match=r"exist|range"):
        BlockMap.find(vit.model()).parse(part)
