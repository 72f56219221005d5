"""More architectures for the contract with PEFT: hierarchical, convolutional, shared, recurrent, two-towered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.support.toys import THREE, TOYS, VOCABULARY, Batch, Toy

_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family(Toy):
    """A toy with inputs of its own kind."""

    inputs: str = "images"

    def batch(self, seed: int = 0, size: int = 4) -> Batch:
        generator = torch.Generator().manual_seed(100 + seed)
        tokens = torch.randint(3, VOCABULARY, (size, 6), generator=generator)
        images = torch.randn(size, 3, 32, 32, generator=generator)
        classes = torch.randint(0, 3, (size,), generator=generator)
        return {
            "images": {"pixel_values": images, "labels": classes},
            "text": {"input_ids": tokens, "labels": classes},
            "language": {"input_ids": tokens, "labels": tokens.clone()},
            "both": {"input_ids": tokens, "pixel_values": images, "return_loss": torch.tensor(True)},
            "speech": {"input_features": torch.randn(size, 8, 40, generator=generator), "labels": tokens},
        }[self.inputs]


def _vit() -> nn.Module:  # a third of the toy's depth: the contract builds it some hundred times
    return ViTForImageClassification(
        ViTConfig(**_SMALL, num_hidden_layers=4, image_size=32, patch_size=16, num_labels=3)
    )


def _swin() -> nn.Module:
    return SwinForImageClassification(
        SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=3
        )
    )


def _convnext() -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 3], num_stages=2, num_labels=3)
    )


def _resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3)
    )


def _modernbert() -> nn.Module:
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            **_SMALL,
            num_hidden_layers=3,
            vocab_size=VOCABULARY,
            num_labels=3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    )


def _albert() -> nn.Module:
    return AlbertForSequenceClassification(
        AlbertConfig(
            **_SMALL,
            embedding_size=8,
            num_hidden_layers=4,
            vocab_size=VOCABULARY,
            num_labels=3,
            max_position_embeddings=16,
            pad_token_id=0,
        )
    )


def _mamba() -> nn.Module:
    return MambaForCausalLM(
        MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=3, tie_word_embeddings=False, **_TEXT)
    )


def _llama_tied() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(**_SMALL, **_TEXT, num_hidden_layers=3, num_key_value_heads=1, tie_word_embeddings=True)
    )


def _levit() -> nn.Module:
    return LevitForImageClassification(
        LevitConfig(
            image_size=32,
            hidden_sizes=[8, 16],
            num_attention_heads=[2, 2],
            depths=[1, 1],
            key_dim=[4, 4],
            attention_ratio=[2, 2],
            mlp_ratio=[2, 2],
            down_ops=[["Subsample", 4, 2, 4, 2, 2], [""]],
            num_labels=3,
        )
    )


def _clip() -> nn.Module:
    text = {**_SMALL, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
    vision = {**_SMALL, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config={**text, "eos_token_id": 2}, vision_config=vision, projection_dim=8))


def _whisper() -> nn.Module:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            **_TEXT,
            d_model=16,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_start_token_id=1,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=16,
        )
    )


_STAGES = ("stages.0.0", "stages.0.1", "stages.1.embeddings", "stages.1.0", "stages.1.1")
FAMILIES = TOYS | {
    family.name: family
    for family in (
        Family("vit", _vit, (*THREE, "3", "final_norm", "head"), "0", "3"),
        Family(
            "swin",
            _swin,
            ("embeddings", *_STAGES, "final_norm", "head"),
            "stages.0.0",
            "stages.1.1",
        ),
        Family(
            "convnext",
            _convnext,
            ("embeddings", *_STAGES, "stages.1.2", "final_norm", "head"),
            "stages.0.0",
            "stages.1.2",
        ),
        Family(
            "resnet",
            _resnet,
            ("embeddings", "stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "head"),
            "stages.0.0",
            "stages.1.1",
        ),
        Family("modernbert", _modernbert, (*THREE, "final_norm", "head"), "0", "2", "text"),
        Family("albert", _albert, ("embeddings", "0", "head"), "0", "head", "text"),
        Family("mamba", _mamba, (*THREE, "final_norm", "head"), "0", "2", "language"),
        Family("llama_tied", _llama_tied, (*THREE, "final_norm"), "embeddings", "2", "language"),
        Family(
            "levit",
            _levit,
            (
                "embeddings",
                *(f"stages.0.{index}" for index in range(4)),
                *("stages.1.0", "stages.1.1", "final_norm", "head"),
            ),
            "stages.0.0",
            "stages.1.0",
        ),
        Family(
            "clip",
            _clip,
            (
                "embeddings",
                *(f"text_model.{name}" for name in ("embeddings", "0", "1", "final_norm")),
                *(f"vision_model.{name}" for name in ("embeddings", "0", "1", "2", "final_norm")),
                "head",
            ),
            "text_model.0",
            "vision_model.2",
            "both",
        ),
        Family(
            "whisper",
            _whisper,
            tuple(f"encoder.{name}" for name in ("embeddings", "0", "1", "final_norm"))
            + tuple(f"decoder.{name}" for name in ("embeddings", "0", "1", "2", "final_norm")),
            "encoder.0",
            "decoder.2",
            "speech",
        ),
    )
}
