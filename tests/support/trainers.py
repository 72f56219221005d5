"""Shared by the tests with trainers of others: a small Llama, its words, and how such a trainer is told to train."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.support.toys import TOYS, VOCABULARY

TUNED = ("model.layers.0.", "model.layers.2.")
WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]
# Not `--cpu`: with it, the launcher starts one process, whatever it is told.
LAUNCH = {
    "ddp": ["--multi_gpu"],
    "fsdp2": [
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
        *("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
        *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
    ],
}


def llama() -> nn.Module:
    return TOYS["llama"].model()


def frozen_but_for(model: nn.Module, tuned: tuple[str, ...]) -> nn.Module:
    """The reference: the bare model, in which only these parameters train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuned))
    return model


def assert_same_weights(merged: nn.Module, reference: nn.Module, **tolerance: float) -> None:
    start = dict(llama().named_parameters())
    for name, expected in reference.named_parameters():
        found = dict(merged.named_parameters())[name]
        torch.testing.assert_close(found.detach(), expected.detach(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(found, start[name]) != name.startswith(TUNED), name


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of `sentence`."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sentence(seed: int, length: int = 6) -> str:
    picks = torch.randint(len(WORDS), (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)


def preferences() -> Dataset:
    columns = {"prompt": "{} ", "chosen": "{}", "rejected": "{}"}  # words are split at the blank
    return Dataset.from_list(
        [
            {name: form.format(sentence(50 * i + k)) for k, (name, form) in enumerate(columns.items())}
            for i in range(12)
        ]
    )


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    common |= {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0}
    return {"output_dir": str(folder), **common, **more}


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
