"""A batch's loss, and which errors are about labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from surgical_peft import BlockMap, SurgicalError, criteria, score_blocks
from surgical_peft.criteria.criterion import needs_of
from tests.support.families import FAMILIES
from tests.support.toys import TOYS, VOCABULARY, Batch

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


def llava() -> tuple[nn.Module, Batch]:
    vision = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)
    text = LlamaConfig(**SMALL, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, tie_word_embeddings=False)
    return LlavaForConditionalGeneration(config), TOYS["llama"].batch()


def captioner() -> tuple[nn.Module, Batch]:
    decoder = BertConfig(**SMALL, vocab_size=VOCABULARY, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig(
        encoder=ViTConfig(**SMALL, image_size=8, patch_size=4).to_dict(), decoder=decoder.to_dict()
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    labels = TOYS["llama"].batch()["labels"]
    return VisionEncoderDecoderModel(config), {"pixel_values": TOYS["vit"].batch()["pixel_values"], "labels": labels}


def tagger() -> tuple[nn.Module, Batch]:
    config = BertConfig(**SMALL, vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=5)
    batch = TOYS["bert"].batch()
    return BertForTokenClassification(config), {**batch, "labels": batch["input_ids"] % 5}


def of_family(name: str) -> Callable[[], tuple[nn.Module, Batch]]:
    return lambda: (FAMILIES[name].model(), FAMILIES[name].batch())


LABELLED: dict[str, tuple[Callable[[], tuple[nn.Module, Batch]], int]] = {
    "llava": (llava, VOCABULARY),
    "captioner": (captioner, VOCABULARY),
    "tagger": (tagger, 5),
    **{name: (of_family(name), VOCABULARY) for name in ("llama", "gpt2", "t5", "whisper", "mamba", "llama_tied")},
    **{name: (of_family(name), 3) for name in ("vit", "swin", "bert", "albert", "levit")},
}


@pytest.fixture(params=LABELLED)
def labeled(request: pytest.FixtureRequest) -> tuple[nn.Module, Batch, int]:
    build, known = LABELLED[request.param]
    return *build(), known


def test_labels_in_range_are_taken_and_others_are_named(labeled: tuple[nn.Module, Batch, int]) -> None:
    model, batch, known = labeled
    batch["labels"].view(-1)[-1] = known - 1
    score_blocks(model, [batch])
    batch["labels"].view(-1)[-1] = known + 4
    with pytest.raises(SurgicalError, match=rf"\b{known + 4}\b.*0 to {known - 1}\b"):
        score_blocks(model, [batch])


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    NotImplementedError("Cannot copy out of meta tensor; no data!"),
    ValueError("Expected input batch_size (4) to match target batch_size (8)."),
    IndexError("tuple index out of range"),
    KeyError("labels"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("without_labels", [False, True])
@pytest.mark.parametrize("name", ["llava", "captioner", "t5", "bert"])
def test_errors_of_the_model_pass_through_whole(name: str, without_labels: bool, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    model, batch = LABELLED[name][0]()
    blocks = BlockMap.find(model)
    for layer in [layer for stack in blocks.stacks.values() for layer in stack]:
        model.get_submodule(blocks.modules[layer][0]).register_forward_pre_hook(fail)
    if without_labels:
        del batch["labels"]
    with pytest.raises(type(error)) as raised:
        score_blocks(model, [batch])
    assert raised.value is error


def test_inputs_out_of_range_are_not_told_as_labels() -> None:
    batch = TOYS["llama"].batch()
    batch["input_ids"][0, 0] = batch["labels"][0, 0] = 99
    with pytest.raises(IndexError):
        score_blocks(TOYS["llama"].model(), [batch])


@pytest.mark.parametrize("name", ["t5", "whisper", "bert", "llama"])
def test_a_batch_without_labels_is_told_as_such(name: str) -> None:
    batch = {key: value for key, value in FAMILIES[name].batch().items() if key != "labels"}
    with pytest.raises(SurgicalError, match="labels"):
        score_blocks(FAMILIES[name].model(), [batch])


@pytest.mark.parametrize("name", criteria.__all__)
def test_out_of_memory_passes_through_every_criterion(name: str) -> None:
    if not needs_of(getattr(criteria, name)).batches:
        pytest.skip("runs no model")

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    model = TOYS["bert"].model()
    model.classifier.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        score_blocks(model, [TOYS["bert"].batch()] * 2, name)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class ReturnsDict(nn.Module):
    """A model of the user's own, whose outputs Trainer takes as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TOYS["vit"].model()

    def forward(self, **batch: Any) -> dict[str, Any]:
        return dict(self.model(**batch))


def test_outputs_may_be_a_plain_dictionary() -> None:
    model, batch = ReturnsDict(), TOYS["vit"].batch()
    assert score_blocks(model, [batch]).values == score_blocks(model.model, [batch]).values
    del batch["labels"]
    with pytest.raises(SurgicalError, match="labels"):
        score_blocks(model, [batch])
