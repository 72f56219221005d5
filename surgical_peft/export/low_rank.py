"""The LoRA format: a truncated SVD of what tuning changed, with the error stated, for stock PEFT.

`peft.convert_to_lora` wants tuners of single Linear layers without changed biases; a tuned block has neither.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..blocks.module_lists import within
from ..errors import SurgicalError, first_of
from ..tuner.loading.saved_adapter import PREFIX, LoadedBase, SavedAdapter, check_fits, heads_of
from ..tuner.tensors.row_names import split_row
from ..validation import check_count
from .stock_peft import check_found_alone, check_untied, stock_config


def write_lora(adapter: SavedAdapter, base: LoadedBase, rank: int, folder: Path) -> dict[str, Any]:
    """Write the adapter as a LoRA of `rank` to an existing `folder`.

    Linear layers (and GPT-2's Conv1D) become LoRA, their biases included. What LoRA cannot hold and tuning changed
    (norms, embeddings, convolutions, raw parameters, weights that the model reads without calling their layer) is
    kept as it is, in the smallest modules around it.

    Returns:
        `error`: for each tuned module the Frobenius norm of what is lost over that of what tuning changed;
        `total_error` over all of them; `lora_modules` and `whole_modules`, and how many `parameters` are stored.

    Raises:
        SurgicalError: a rank below 1, another base model, or nothing for LoRA to hold.
    """
    check_count("LoRA", "rank", rank, "of the updates")
    if adapter.config.lora:
        raise SurgicalError("the adapter holds LoRA weights beside its blocks already: export it with --format peft.")
    if rows := [name for name in adapter.own if split_row(name)]:
        raise SurgicalError(
            f"the adapter tunes single experts ({first_of(rows, most=2)}), and stock PEFT's LoRA is of whole layers: "
            "export it with --format merged or delta."
        )
    state = base.model.state_dict()
    fresh = adapter.new_to(base)
    check_fits(adapter, state, fresh)
    modules = dict(base.model.named_modules())
    changed = [
        name
        for name, tuned in adapter.tensors.items()
        if name in fresh or not torch.equal(tuned, state[name].to(tuned.dtype))
    ]
    check_untied(base.model, changed)
    low, whole = _divide(modules, changed, fresh, heads_of(adapter.config, modules))
    check_found_alone(modules, [*low, *whole])
    has_bias = any(f"{path}.bias" in changed for path in low)
    layers = {path: _factorize(adapter, state, modules[path], path, rank, has_bias) for path in low}
    tensors = {name: tensor for layer in layers.values() for name, tensor in layer.tensors.items()}
    for path in whole:
        keys = [name for name in state if within(name, [path])]
        tensors |= {name: adapter.tensors.get(name, state[name]).contiguous() for name in keys}
    save_file(
        {PREFIX + name: tensor for name, tensor in tensors.items()},
        folder / SAFETENSORS_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )
    _config(adapter, layers, whole, rank, modules).save_pretrained(str(folder))
    losses_of = {
        tuned: [layer.loss for path, layer in layers.items() if within(path, [tuned])]
        for tuned in adapter.config.tuned_modules or {}
    }
    return {
        "rank": rank,
        "error": {path: _relative(losses) for path, losses in losses_of.items()},
        "total_error": _relative([loss for losses in losses_of.values() for loss in losses]),
        "lora_modules": len(low),
        "whole_modules": whole,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def _config(
    adapter: SavedAdapter, layers: dict[str, _Layer], whole: Sequence[str], rank: int, modules: dict[str, nn.Module]
) -> LoraConfig:
    lower = {path: layer.rank for path, layer in layers.items() if layer.rank != rank}
    lora = {
        "target_modules": list(layers),
        "r": rank,
        "lora_alpha": rank,  # alpha / r = 1: what is stored is what is added
        "rank_pattern": lower,
        "alpha_pattern": lower,
        "lora_bias": any(layer.has_bias for layer in layers.values()),
        "fan_in_fan_out": any(isinstance(modules[path], Conv1D) for path in layers),
    }
    return stock_config(adapter.config, whole, lora)


def _divide(
    modules: dict[str, nn.Module], changed: Sequence[str], new: Collection[str], heads: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Paths of the modules that become LoRA, and of those that are kept whole.

    Raises:
        SurgicalError: there is nothing for LoRA to hold.
    """
    owners = dict.fromkeys(name.rpartition(".")[0] for name in changed)
    with_new = {name.rpartition(".")[0] for name in changed if name in new}
    kept = [path for path in owners if path in with_new or not can_be_low_rank(modules, path)]
    whole = [*heads, *(path for path in kept if path not in heads)]
    whole = [path for path in whole if not within(path, [other for other in whole if other != path])]
    low = [path for path in owners if not within(path, whole)]
    if "" in whole or not low:
        raise SurgicalError(
            "tuning changed no Linear weight that LoRA could hold" + (" alone" if low else "") + ": export with "
            "--format peft, merged or delta."
        )
    return low, whole


@dataclass(frozen=True)
class _Layer:
    """A layer as LoRA.

    Attributes:
        tensors: its factors and its bias by their names in PEFT.
        rank: at most what was asked for.
        loss: Frobenius norms of what is lost, and of what tuning changed.
        has_bias: whether there is a bias among them.
    """

    tensors: dict[str, Tensor]
    rank: int
    loss: tuple[float, float]
    has_bias: bool


def _factorize(
    adapter: SavedAdapter, state: dict[str, Tensor], module: nn.Module, path: str, rank: int, has_bias: bool
) -> _Layer:
    origin = state[f"{path}.weight"]
    tuned = adapter.tensors.get(f"{path}.weight", origin)
    change = _wide(tuned) - _wide(origin)
    change = change.T if isinstance(module, Conv1D) else change  # which keeps its weight transposed
    rank = min(rank, *change.shape)
    down, up = (factor.to(tuned.dtype) for factor in low_rank(change, rank))
    tensors = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    if has_bias:
        before = state.get(f"{path}.bias", torch.zeros(up.shape[0], dtype=up.dtype))
        after = adapter.tensors.get(f"{path}.bias", before)
        tensors[f"{path}.lora_B.bias"] = (_wide(after) - _wide(before)).to(up.dtype)
    lost = float((change - _wide(up) @ _wide(down)).norm())
    return _Layer(tensors, rank, (lost, float(change.norm())), has_bias)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`(down, up)` with `up @ down` the best approximation of `matrix` of that rank in the Frobenius norm.

    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()  # half precision has no SVD


def _relative(pairs: list[tuple[float, float]]) -> float:
    """Norm of what is lost over the norm of the change of the Linear weights; 0 where there are none."""
    lost, change = (sum(norm**2 for norm in norms) ** 0.5 for norms in zip(*pairs, strict=True)) if pairs else (0, 0)
    return lost / change if change else 0.0


def can_be_low_rank(modules: dict[str, nn.Module], path: str) -> bool:
    """LoRA can stand for a change of this module: it is a Linear layer that is called, and not read directly."""
    if type(modules[path]) not in (nn.Linear, Conv1D):
        return False
    parent, _, name = path.rpartition(".")
    model_type = getattr(getattr(modules[""], "config", None), "model_type", "")
    if "mamba" in model_type and name == "out_proj":  # PEFT refuses it: fused kernels take its weight
        return False
    try:
        source = inspect.getsource(type(modules[parent]))
    except (OSError, TypeError):  # built in, or typed at a prompt
        return False
    # Mamba's `self.dt_proj.weight @ x`: the LoRA would be skipped without a word.
    return not re.search(rf"(?<!isinstance\()self\.{re.escape(name)}\.weight\b(?!\.(?:dtype|device|shape)\b)", source)
