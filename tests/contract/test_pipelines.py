"""`pipeline(...)` of transformers on a wrapped model and on an adapter's directory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # the one without torchvision

from tests.support.families import FAMILIES
from tests.support.toys import VOCABULARY
from tests.support.wrapping import Saved

# transformers 5 has no pipeline for T5's text to text; Whisper's wants Whisper's own tokenizer with its timestamps.
NONE = ("t5", "whisper")
TASKS = {
    **dict.fromkeys(("vit", "swin", "convnext", "resnet", "levit"), "image-classification"),
    **dict.fromkeys(("bert", "modernbert", "albert"), "text-classification"),
    **dict.fromkeys(("llama", "llama_tied", "gpt2", "qwen3_moe", "mamba"), "text-generation"),
    "clip": "zero-shot-image-classification",
}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **special
    )


def answer(task: str, model: Any) -> Any:
    parts: dict[str, Any] = {} if task == "image-classification" else {"tokenizer": tokenizer()}
    if "image" not in task:
        more = {"max_new_tokens": 4, "do_sample": False} if task == "text-generation" else {"top_k": None}
        return pipeline(task, model=model, device="cpu", **parts)("w1 w2 w3 w4", **more)
    parts["image_processor"] = ViTImageProcessorPil(size={"height": 32, "width": 32})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    more = {"candidate_labels": ["w1 w2", "w3"], "hypothesis_template": "{}"} if "zero-shot" in task else {}
    return pipeline(task, model=model, device="cpu", **parts)(picture, **more)


def scores(answered: Any) -> Any:
    """What can be compared to the last bits: scores by label, or the generated text."""
    if "generated_text" in answered[0]:
        return {answered[0]["generated_text"]: 1.0}
    return {each["label"]: each["score"] for each in answered}


def test_every_family_has_its_task() -> None:
    assert set(TASKS) | set(NONE) == set(FAMILIES)


def test_a_pipeline_answers_with_the_tuned_blocks(saved: Saved) -> None:
    if saved.family.name in NONE:
        pytest.skip("transformers has no pipeline that takes a small tokenizer for it")
    task = TASKS[saved.family.name]
    model = PeftModel.from_pretrained(saved.family.model(), saved.adapter)
    wrapped, base = scores(answer(task, model)), scores(answer(task, saved.family.model()))

    directory = scores(answer(task, str(saved.adapter)))
    merged = scores(answer(task, model.merge_and_unload()))

    assert wrapped == pytest.approx(merged, rel=1e-5)
    assert directory == pytest.approx(merged, rel=1e-5)
    assert wrapped != pytest.approx(base, rel=1e-3)
