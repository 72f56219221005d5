"""Toy models: real architectures of transformers, a few thousand parameters each, with a batch that gives a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, torch.Tensor]
VOCABULARY = 24


@dataclass(frozen=True)
class Toy:
    """A model family: how to build it, the block names it must have, and its batches."""

    name: str
    build: Callable[[], nn.Module]
    blocks: tuple[str, ...]
    first: str
    last: str

    def model(self, seed: int = 0) -> nn.Module:
        """The model in eval mode; no weight is zero, so that every norm and ratio is defined."""
        torch.manual_seed(seed)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    def batch(self, seed: int = 0, size: int = 4) -> Batch:
        generator = torch.Generator().manual_seed(100 + seed)
        if self.name == "vit":
            images = torch.randn(size, 3, 8, 8, generator=generator)
            return {"pixel_values": images, "labels": torch.randint(0, 3, (size,), generator=generator)}
        tokens = torch.randint(3, VOCABULARY, (size, 6), generator=generator)
        if self.name == "bert":
            return {"input_ids": tokens, "labels": torch.randint(0, 3, (size,), generator=generator)}
        return {"input_ids": tokens, "labels": tokens.clone()}


_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(**_SMALL, num_hidden_layers=12, image_size=8, patch_size=4, num_labels=3)
    )


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(**_SMALL, num_hidden_layers=3, vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=3)
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(**_SMALL, **_IDS, num_hidden_layers=3, vocab_size=VOCABULARY, num_key_value_heads=1)
    )


def _gpt2() -> nn.Module:
    config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=VOCABULARY, n_positions=16, **_IDS)
    return GPT2LMHeadModel(config)  # ties its head to the embeddings


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    )


def _qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SMALL,
            **_IDS,
            num_hidden_layers=3,
            vocab_size=VOCABULARY,
            num_key_value_heads=1,
            head_dim=8,
            moe_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


THREE = ("embeddings", "0", "1", "2")
TOYS = {
    toy.name: toy
    for toy in (
        Toy("vit", _vit, ("embeddings", *map(str, range(12)), "final_norm", "head"), "0", "11"),
        Toy("bert", _bert, (*THREE, "head"), "0", "2"),
        Toy("llama", _llama, (*THREE, "final_norm", "head"), "0", "2"),
        Toy("gpt2", _gpt2, (*THREE, "final_norm"), "0", "2"),
        Toy(
            "t5",
            _t5,
            (
                "embeddings",
                *("encoder.0", "encoder.1", "encoder.final_norm"),
                *("decoder.0", "decoder.1", "decoder.final_norm"),
            ),
            "encoder.0",
            "decoder.1",
        ),
        Toy("qwen3_moe", _qwen3_moe, (*THREE, "final_norm", "head"), "0", "2"),
    )
}
