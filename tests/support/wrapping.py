"""Shared by the tests of the contract with PEFT: wrap a family's model, run it, change it, look at its parts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from surgical_peft import BlockMap, SurgicalConfig
from surgical_peft.tuner.layer import SurgicalLayer
from tests.support.toys import Batch, Toy

AUTO_CLASSES = {
    **dict.fromkeys(("vit", "swin", "convnext", "resnet", "levit"), transformers.AutoModelForImageClassification),
    **dict.fromkeys(("bert", "modernbert", "albert"), transformers.AutoModelForSequenceClassification),
    **dict.fromkeys(("llama", "gpt2", "qwen3_moe", "mamba", "llama_tied"), transformers.AutoModelForCausalLM),
    "t5": transformers.AutoModelForSeq2SeqLM,
    "clip": transformers.AutoModel,
    "whisper": transformers.AutoModelForSpeechSeq2Seq,
}


@dataclass(frozen=True)
class Saved:
    """A tuned adapter on disk, with its base model, and what both should answer."""

    family: Toy
    base: Path
    adapter: Path
    base_logits: Tensor
    tuned_logits: Tensor


def wrap(family: Toy, blocks: list[str] | None = None, **kwargs: Any) -> PeftModel:
    return get_peft_model(family.model(), SurgicalConfig(blocks=blocks or [family.first, family.last], **kwargs))


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output.logits_per_image if "logits_per_image" in output else output.logits


@functools.cache
def base_logits(family: Toy) -> Tensor:
    """What the family's model answers to its batch before any tuning."""
    return logits(family.model(), family.batch())


def same(mine: Tensor, theirs: Tensor) -> bool:
    """Equal, but for the last bit: Mamba's scan depends on where its activations lie in memory."""
    return torch.equal(mine, theirs) or torch.allclose(mine, theirs, rtol=1e-6, atol=1e-6)


def nudge(model: nn.Module, seed: int = 0) -> nn.Module:
    """Change everything trainable, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def adapted(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters under the base model's own names."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def layers(model: nn.Module) -> list[SurgicalLayer]:
    """What holds the parked tensors, in the order of the modules."""
    return [module for module in model.modules() if isinstance(module, SurgicalLayer)]


def module_paths(model: nn.Module, *blocks: str) -> list[str]:
    found = BlockMap.find(model)
    return [path for block in blocks for path in found.modules[block]]


def assert_partition(blocks: BlockMap, model: nn.Module) -> None:
    grouped = blocks.parameters(model)
    assert tuple(grouped) == blocks.names
    ids = [id(parameter) for group in grouped.values() for parameter in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()}


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT 0.21 reads a property that transformers 5.23 has deprecated
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        yield
