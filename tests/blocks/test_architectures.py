"""The block map of architectures of every kind: how many layers, under which names, and in the order they run in.

`benchmarks/architectures/run.py` looks at every architecture that transformers has; here is a sample for each rule.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel, XLMConfig, XLMWithLMHeadModel

from surgical_peft import BlockMap
from tests.support.wrapping import assert_partition

ENCODER_DECODER = {"encoder": 12, "decoder": 12}


def stages(*depths: int, tower: str = "") -> dict[str, int]:
    return {f"{tower}stages.{index}": depth for index, depth in enumerate(depths)}


# Numbers of layers as the papers and the default configs have them.
STACKS: dict[str, dict[str, int]] = {
    # one list, of one class
    "bert": {"": 12},
    "deberta-v2": {"": 24},
    "distilbert": {"": 6},
    "gpt2": {"": 12},
    "gpt_neox": {"": 44},
    "llama": {"": 32},
    "mpt": {"": 24},
    "mobilebert": {"": 24},  # its layers hold a list of feed-forward nets
    "wav2vec2": {"": 12},  # besides a list of 7 convolutions
    "markuplm": {"": 12},  # besides two lists of 50 embeddings
    # one list, of several classes
    "jamba": {"": 32},
    "recurrent_gemma": {"": 26},
    "zamba2": {"": 54},
    "nemotron_h": {"": 4},
    "mobilenet_v2": {"": 16},
    # without attention
    "mamba": {"": 32},
    "rwkv": {"": 32},
    "fnet": {"": 12},
    "efficientnet": {"": 55},
    "mobilenet_v1": {"": 26},  # of single convolutions
    "patchtsmixer": {"": 3},
    "dac": {"encoder": 4, "decoder": 4},  # besides 9 quantizers
    # shared, nested or spread layers
    "albert": {"": 1},
    "xlm": {"": 12},
    "perceiver": {"": 26},
    "blt": {"local_encoder": 1, "global_transformer": 25, "local_decoder": 9, "patcher": 14},
    # experts
    "mixtral": {"": 32},
    "switch_transformers": ENCODER_DECODER,
    # towers
    "bart": ENCODER_DECODER,
    "t5": {"encoder": 6, "decoder": 6},
    "whisper": {"encoder": 4, "decoder": 4},
    "blip-2": {"vision_model": 39, "qformer": 12, "language_model": 12},
    "clip": {"text_model": 12, "vision_model": 12},
    "qwen3_vl": {"visual": 27, "language_model": 32},  # besides a list of 3 mergers
    "idefics": {"vision_model": 32, "layers": 32, "gated_cross_attn_layers": 32},
    "sam": {"vision_encoder": 12, "mask_decoder": 2},
    # stages
    "convnext": stages(3, 3, 9, 3),
    "focalnet": stages(2, 2, 6, 2),
    "glpn": stages(2, 2, 2, 2),  # lists of lists
    "hiera": stages(2, 3, 16, 3),
    "levit": stages(10, 10, 8),  # attention and feed-forward net count as two
    "mobilevit": stages(1, 3, 2, 4, 3),
    "poolformer": stages(2, 2, 6, 2),
    "pvt_v2": stages(2, 2, 2, 2),
    "regnet": stages(2, 6, 12, 2),
    "resnet": stages(3, 4, 6, 3),
    "segformer": stages(2, 2, 2, 2),
    "swiftformer": stages(3, 3, 6, 4),
    "swin": stages(2, 2, 6, 2),
    "swin2sr": stages(6, 6, 6, 6, 6, 6),
    # stages in towers
    "clap": {"text_model": 12, **stages(2, 2, 6, 2, tower="audio_model.")},
    "groupvit": {"text_model": 12, **stages(6, 3, 3, tower="vision_model.")},
    "rt_detr": {**stages(3, 4, 6, 3, tower="backbone."), "encoder": 1, "decoder": 6},  # the neck's lists are none
}


def on_meta(kind: str, **settings: object) -> PreTrainedModel:
    config = CONFIG_MAPPING[kind](**settings)
    found = MODEL_MAPPING[type(config)]
    with torch.device("meta"):
        return (found[0] if isinstance(found, tuple) else found)(config)


@pytest.mark.parametrize("kind", STACKS)
def test_the_layers_of_an_architecture(kind: str) -> None:
    model = on_meta(kind)
    blocks = BlockMap.find(model)
    assert {label: len(names) for label, names in blocks.stacks.items()} == STACKS[kind]
    assert_partition(blocks, model)
    assert all(blocks.parameters(model).values())


TEXT = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {**TEXT, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2} | {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
IDS = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 2]])}
BOTH = {**IDS, "decoder_input_ids": IDS["input_ids"]}
IMAGE = {"pixel_values": torch.zeros(1, 3, 64, 64)}
SMALL: dict[str, tuple[dict[str, object], dict[str, torch.Tensor]]] = {
    "albert": ({**ENCODER, "embedding_size": 16, "num_hidden_groups": 2}, IDS),
    "bart": ({**TEXT, **BART, "max_position_embeddings": 16}, BOTH),
    "bert": (ENCODER, IDS),
    "convnext": ({"depths": [1, 2, 1, 1], "hidden_sizes": [8, 16, 24, 32]}, IMAGE),
    "funnel": (
        {"vocab_size": 20, "block_sizes": [2, 2], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16},
        IDS,
    ),
    "gpt2": ({**TEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}, IDS),
    "jamba": ({**ENCODER, "num_hidden_layers": 5, "num_key_value_heads": 1, "use_mamba_kernels": False}, IDS),
    "mamba": ({**TEXT, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, IDS),
    "opt": ({**TEXT, "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 16, "num_hidden_layers": 2}, IDS),
    "qwen3_moe": ({**ENCODER, **EXPERTS, "num_key_value_heads": 1}, IDS),
    "resnet": ({"embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "layer_type": "basic"}, IMAGE),
    "segformer": (
        {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "depths": [2, 1, 1, 2]},
        IMAGE,
    ),
    "swin": (
        {"image_size": 64, "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 2], "window_size": 4},
        IMAGE,
    ),
    "t5": ({**TEXT, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}, BOTH),
    "xlm": ({"n_words": 20, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16}, IDS),
}


def in_order_of_call(model: nn.Module, blocks: BlockMap, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The blocks in the order in which one of their modules is first called."""
    called: list[str] = []
    modules = dict(model.named_modules())
    for block, paths in blocks.modules.items():
        for path in paths:
            if path in modules:  # a lone parameter is never called
                modules[path].register_forward_pre_hook(lambda *_, block=block: called.append(block))
    with torch.no_grad():
        model.eval()(**inputs)
    return list(dict.fromkeys(called))


@pytest.mark.parametrize("kind", SMALL)
def test_blocks_are_in_the_order_of_execution(kind: str) -> None:
    """OPT's norm, Funnel's stages and what stands between the stages of Swin and ConvNeXt among them."""
    settings, inputs = SMALL[kind]
    config = CONFIG_MAPPING[kind](**settings)
    found = MODEL_MAPPING[type(config)]
    model = (found[0] if isinstance(found, tuple) else found)(config)
    blocks = BlockMap.find(model)
    called = in_order_of_call(model, blocks, inputs)
    assert {layer for stack in blocks.stacks.values() for layer in stack} <= set(called)
    assert called == [block for block in blocks.names if block in called]


def test_a_part_of_layers_of_several_lists_is_one_block() -> None:
    """XLM keeps attention, feed-forward nets and their norms in four lists."""
    blocks = BlockMap.find(on_meta("xlm"))
    assert blocks.modules["3"] == ("attentions.3", "layer_norm1.3", "ffns.3", "layer_norm2.3")


@pytest.mark.parametrize(
    ("kind", "name", "block"),
    [
        ("opt", "decoder.final_layer_norm.weight", "final_norm"),  # declared before the layers
        ("t5gemma", "encoder.norm.weight", "encoder.final_norm"),  # so are these
        ("mllama", "vision_model.layernorm_post.weight", "vision_model.final_norm"),
        ("bart", "encoder.layernorm_embedding.weight", "encoder.embeddings"),  # declared after the layers
        ("gemma3n_text", "per_layer_model_projection.weight", "embeddings"),  # so are these
        ("decision_transformer", "embed_return.weight", "embeddings"),
        ("clip", "vision_model.pre_layrnorm.weight", "vision_model.embeddings"),
        ("vit_mae", "embeddings.position_embeddings", "embeddings"),  # fixed, yet in the partition
        ("swin", "encoder.layers.0.downsample.norm.weight", "stages.1.embeddings"),
        ("convnext", "encoder.stages.2.downsampling_layer.1.weight", "stages.2.embeddings"),
        ("glpn", "encoder.layer_norm.1.weight", "stages.1.final_norm"),
        ("segformer", "stages.1.patch_embeddings.proj.weight", "stages.1.embeddings"),
    ],
)
def test_what_lies_outside_the_layers(kind: str, name: str, block: str) -> None:
    blocks = BlockMap.find(on_meta(kind))
    assert blocks.block_of(name) == block


def test_a_bias_beside_a_tied_weight_is_of_the_head() -> None:
    """It was looked up with the tied weight, which is of the embeddings, and left an empty head behind."""
    with torch.device("meta"):
        model = XLMWithLMHeadModel(XLMConfig(n_layers=2))
    blocks = BlockMap.find(model)
    assert blocks.block_of("pred_layer.proj.weight") == "embeddings"
    assert list(blocks.named_parameters(model)["head"]) == ["pred_layer.proj.bias"]


@pytest.mark.parametrize(("stable", "block"), [(False, "embeddings"), (True, "final_norm")])
def test_the_norm_of_wav2vec2_runs_where_its_encoder_says(stable: bool, block: str) -> None:
    """Both kinds of encoder declare it before the layers."""
    blocks = BlockMap.find(on_meta("wav2vec2", do_stable_layer_norm=stable, num_hidden_layers=2))
    assert blocks.block_of("encoder.layer_norm.weight") == block


class Layer(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x))


class Plain(nn.Module):
    """A net without attention: a stem, one repeated list or stages of it, a norm and a head."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.body = layers
        self.neck = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("body", "number"),
    [
        (nn.ModuleList([Layer(), Layer(), Layer()]), 3),
        (nn.Sequential(Layer(), Layer(), Layer()), 3),
        (nn.ModuleList([Layer()]), 1),
    ],
)
def test_a_plain_module_with_one_repeated_list(body: nn.Module, number: int) -> None:
    model = Plain(body)
    blocks = BlockMap.find(model)
    assert blocks.stacks == {"": tuple(map(str, range(number)))}
    assert blocks.names[0] == "embeddings" and blocks.names[-1] == "head"
    assert_partition(blocks, model)


def test_numbered_sequences_are_stages() -> None:
    """torchvision's and timm's ResNet have `layer1` to `layer4`."""
    model = nn.Module()
    model.conv1 = nn.Conv2d(3, 4, 3)
    for index, (depth, width) in enumerate([(2, 4), (3, 8)], start=1):
        setattr(model, f"layer{index}", nn.Sequential(*map(Layer, [width] * depth)))
    model.fc = nn.Linear(8, 2)
    blocks = BlockMap.find(model)
    assert blocks.stacks == {
        "stages.0": ("stages.0.0", "stages.0.1"),
        "stages.1": ("stages.1.0", "stages.1.1", "stages.1.2"),
    }
    assert blocks.names == ("embeddings", *blocks.stacks["stages.0"], *blocks.stacks["stages.1"], "head")
    assert blocks.parse("stages.1[-1]") == ("stages.1.2",)


def test_experts_are_no_layers() -> None:
    layers = []
    for _ in range(2):
        layer = nn.Module()
        layer.attention = nn.MultiheadAttention(4, 2)
        layer.experts = nn.ModuleList(Layer() for _ in range(8))
        layers.append(layer)
    assert BlockMap.find(Plain(nn.ModuleList(layers))).stacks == {"": ("0", "1")}


def test_one_module_many_times_is_one_layer() -> None:
    """A list of one shared layer (weight sharing across depth) has one block, not as many as there are entries."""
    shared = Layer()
    assert BlockMap.find(Plain(nn.ModuleList([shared] * 3))).stacks == {"": ("0",)}
