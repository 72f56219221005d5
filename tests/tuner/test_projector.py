"""A projector that shares its block with something else is tuned alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from surgical_peft import SurgicalConfig, SurgicalError
from tests.support.wrapping import trainable


def llava_next() -> nn.Module:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    text = LlamaConfig(**small, vocab_size=24, num_key_value_heads=1)
    vision = CLIPVisionConfig(**small, image_size=32, patch_size=8)
    config = LlavaNextConfig(text_config=text, vision_config=vision, image_grid_pinpoints=[[32, 32]])
    return LlavaNextForConditionalGeneration(config)


@pytest.mark.parametrize("blocks", ["projector", ["projector", "language_model.0"]])
def test_the_projector_is_tuned_without_what_is_beside_it(blocks: str | list[str], tmp_path: Path) -> None:
    model = get_peft_model(llava_next(), SurgicalConfig(blocks=blocks))
    names = trainable(model)
    assert sum("multi_modal_projector" in name for name in names) == 4
    assert not any("image_newline" in name for name in names)
    assert any("language_model" in name for name in names) == isinstance(blocks, list)
    model.save_pretrained(tmp_path)
    assert trainable(PeftModel.from_pretrained(llava_next(), tmp_path, is_trainable=True)) == names


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"blocks": ["projector", "embeddings"]}, "'embeddings' is named twice"),
        ({"blocks": ["projector"], "target_modules": ["mlp"]}, "multi_modal_projector"),
    ],
)
def test_two_choices_for_its_block_are_refused(settings: dict[str, list[str]], why: str) -> None:
    with pytest.raises(SurgicalError, match=why):
        get_peft_model(llava_next(), SurgicalConfig(**settings))  # type: ignore[arg-type]
