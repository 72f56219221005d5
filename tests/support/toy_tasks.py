"""A recipe for each task: a tiny model with its tokenizer or image processor, and a few rows of data, on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from surgical_peft.experiments.recipe.recipe import Recipe

WORDS = ("free", "money", "win", "now", "meet", "us", "at", "noon", "Ada", "Berlin", "in", "lives")
SIZES = {"train": 12, "validation": 6, "test": 6}
_SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}


def words(rng: np.random.Generator) -> list[str]:
    """Two to eight words."""
    return rng.choice(WORDS, size=rng.integers(2, 9)).tolist()


def write_data(folder: Path, rows: Callable[[int, np.random.Generator], dict[str, Any]], features: Any) -> Path:
    """A folder with a Parquet file for each split."""
    rng = np.random.default_rng(0)
    for split, size in SIZES.items():
        data = Dataset.from_list([rows(number, rng) for number in range(size)], features=Features(features))
        data.to_parquet(folder / f"{split}.parquet")
    return folder


def write_model(folder: Path, model: Any, lowercase: bool = False, **tokens: Any) -> Path:
    """A folder with a model and, if it reads text, a tokenizer that knows `WORDS`."""
    model.save_pretrained(folder)
    if isinstance(model, ViTForImageClassification):
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
        return folder
    special = ["<pad>", "</s>", "<unk>"]
    known = [word.lower() if lowercase else word for word in WORDS]
    vocabulary = {word: number for number, word in enumerate([*special, *known])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if lowercase:
        tokenizer.normalizer = Lowercase()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", **{"pad_token": "<pad>", **tokens}
    ).save_pretrained(folder)
    return folder


def bert(kind: Any, labels: int, **config: Any) -> Any:
    """A toy BERT with a head for so many labels."""
    torch.manual_seed(0)
    return kind(BertConfig(**_SMALL, vocab_size=20, max_position_embeddings=16, num_labels=labels, **config))


def _image_classification(folder: Path) -> Recipe:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**_SMALL, image_size=8, patch_size=4, num_labels=3))
    features = {"image": Image(), "label": ClassLabel(names=["a", "b", "c"])}

    def row(number: int, rng: np.random.Generator) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return {"image": PILImage.fromarray(pixels), "label": number % 3}

    return Recipe(
        model=str(write_model(folder / "model", model)),
        data=str(write_data(folder / "data", row, features)),
        task="image_classification",
        corruption="contrast",
    )


def _text_classification(folder: Path) -> Recipe:
    features = {"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])}
    return Recipe(
        model=str(write_model(folder / "model", bert(BertForSequenceClassification, 2))),
        data=str(write_data(folder / "data", lambda n, rng: {"text": " ".join(words(rng)), "label": n % 2}, features)),
        task="text_classification",
        character_noise=20,
    )


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def _token_classification(folder: Path) -> Recipe:
    features = {"tokens": List(Value("string")), "tags": List(ClassLabel(names=list(TAGS)))}

    def row(number: int, rng: np.random.Generator) -> dict[str, Any]:
        chosen = words(rng)
        return {"tokens": chosen, "tags": [{"Ada": 1, "Berlin": 3}.get(word, 0) for word in chosen]}

    return Recipe(
        model=str(write_model(folder / "model", bert(BertForTokenClassification, 5, id2label=dict(enumerate(TAGS))))),
        data=str(write_data(folder / "data", row, features)),
        task="token_classification",
    )


def _causal_lm(folder: Path) -> Recipe:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**_SMALL, num_key_value_heads=1, vocab_size=20, max_position_embeddings=16, eos_token_id=1)
    )
    features = {"text": Value("string")}
    return Recipe(
        model=str(write_model(folder / "model", model, pad_token=None)),
        data=str(write_data(folder / "data", lambda n, rng: {"text": " ".join(words(rng))}, features)),
        task="causal_lm",
    )


def _seq2seq(folder: Path) -> Recipe:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    )

    def row(number: int, rng: np.random.Generator) -> dict[str, Any]:
        chosen = words(rng)
        return {"text": " ".join(chosen), "target": chosen[0]}

    features = {"text": Value("string"), "target": Value("string")}
    return Recipe(
        model=str(write_model(folder / "model", model)),
        data=str(write_data(folder / "data", row, features)),
        task="seq2seq",
        max_length=12,
    )


def _question_answering(folder: Path) -> Recipe:
    features = {"question": Value("string"), "context": Value("string")}

    def row(number: int, rng: np.random.Generator) -> dict[str, Any]:
        chosen = words(rng)
        at = int(rng.integers(len(chosen)))
        answers = {"text": [chosen[at]], "answer_start": [len(" ".join([*chosen[:at], ""]))]}
        return {"question": chosen[0], "context": " ".join(chosen), "answers": answers}

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    return Recipe(
        model=str(write_model(folder / "model", bert(BertForQuestionAnswering, 2))),
        data=str(write_data(folder / "data", row, {**features, "answers": answers})),
        task="question_answering",
    )


TOY_TASKS: dict[str, Callable[[Path], Recipe]] = {
    "image_classification": _image_classification,
    "text_classification": _text_classification,
    "token_classification": _token_classification,
    "causal_lm": _causal_lm,
    "seq2seq": _seq2seq,
    "question_answering": _question_answering,
}
