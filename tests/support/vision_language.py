"""A small vision-language model."""

from __future__ import annotations

from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def qwen2_vl() -> nn.Module:
    """A language model of 4 layers, tied, behind a vision tower of 5; by their names both have layers 0 to 3."""
    text = {**_SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "vocab_size": 24, "tie_word_embeddings": True}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 5, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    )
