"""Mixtures of experts: stacked in one weight, with biases or without, or a list of modules."""

from __future__ import annotations

from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from tests.support.families import FAMILIES, Family
from tests.support.toys import VOCABULARY, Toy

_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8, **_IDS}
_CHOSEN = {"num_hidden_layers": 2, "num_experts_per_tok": 2}


def _mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_SMALL, **_CHOSEN, num_local_experts=4))


def _olmoe() -> nn.Module:
    return OlmoeForCausalLM(OlmoeConfig(**_SMALL, **_CHOSEN, num_experts=4))


def _gpt_oss() -> nn.Module:
    return GptOssForCausalLM(GptOssConfig(**_SMALL, **_CHOSEN, num_local_experts=4, head_dim=8))


def _nllb_moe() -> nn.Module:
    return NllbMoeForConditionalGeneration(
        NllbMoeConfig(
            **_IDS,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            num_experts=4,
            encoder_sparse_step=1,
            decoder_sparse_step=1,
            expert_capacity=64,
            decoder_start_token_id=1,
            max_position_embeddings=32,
            router_ignore_padding_tokens=False,
        )
    )


MIXTURES: dict[str, Toy] = {
    "qwen3_moe": FAMILIES["qwen3_moe"],
    **{
        name: Family(name, build, (), first, first, "language")
        for name, build, first in (
            ("mixtral", _mixtral, "1"),
            ("olmoe", _olmoe, "1"),
            ("gpt_oss", _gpt_oss, "1"),
            ("nllb_moe", _nllb_moe, "encoder.0"),
        )
    },
}
