"""Batches as examples: where each stands in the padding, and a digest that it is known by in every batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Tensor]
INPUT, DECODER = "input", "decoder"  # sequences that are padded by themselves
NOT_INPUTS = ("num_items_in_batch",)  # of Trainer, for the mean of the loss
_IGNORED = -100  # a label that the loss leaves out


@dataclass(frozen=True)
class Sequences:
    """The padded dimension of a batch.

    Attributes:
        length: of the batch, padding included.
        spans: first token of each example, and the one after its last.
    """

    length: int
    spans: Sequence[tuple[int, int]]


def tensors_of(given: Mapping[str, Any]) -> tuple[dict[str, Tensor], str | None]:
    """The tensors among the arguments of a model, and why examples cannot be told apart by them, if so."""
    batch = {name: value for name, value in given.items() if isinstance(value, Tensor) and name not in NOT_INPUTS}
    others = {name: value for name, value in given.items() if name not in batch and name not in NOT_INPUTS}
    odd = [name for name, value in others.items() if not isinstance(value, None | bool | int | float | str)]
    if odd:
        return batch, f"the model is called with {odd[0]}={type(others[odd[0]]).__name__}(...)"
    sizes = {name: len(value) if value.ndim else 0 for name, value in batch.items()}
    size = next(iter(sizes.values()), 0)
    if not size or len(set(sizes.values())) > 1:
        shapes = ", ".join(f"{name} {list(batch[name].shape)}" for name in batch)
        return batch, f"the inputs have no entry for each example: {shapes}"
    return batch, None


def sequences_of(batch: Batch, is_encoder_decoder: bool) -> dict[str, Sequences]:
    """The dimensions of a batch that have an entry for each token: of its inputs and, by itself, of its decoder.

    Padded is what the attention mask leaves out; of a decoder without one what comes after the labels.
    """
    masks = {INPUT: _mask_of(batch, "attention_mask", "input_ids")}
    if is_encoder_decoder:
        labels = batch.get("labels")
        masks[DECODER] = _mask_of(batch, "decoder_attention_mask", "decoder_input_ids")
        if labels is not None and "decoder_attention_mask" not in batch:
            masks[DECODER] = labels != _IGNORED
    found = {}
    for name, mask in masks.items():
        if mask is None or mask.ndim != 2 or not mask.shape[1]:
            continue
        real = mask.cpu().bool()
        after = real.shape[1] - real.flip(1).int().argmax(1)
        first = torch.zeros_like(after) if name == DECODER else real.int().argmax(1)
        empty = ~real.any(1)
        spans = zip((first * ~empty).tolist(), after.masked_fill(empty, real.shape[1]).tolist(), strict=True)
        found[name] = Sequences(real.shape[1], list(spans))
    return found


def _mask_of(batch: Batch, mask: str, tokens: str) -> Tensor | None:
    if mask in batch or tokens not in batch:
        return batch.get(mask)
    return torch.ones_like(batch[tokens], dtype=torch.bool)


def aligned(batch: Batch, sequences: Mapping[str, Sequences]) -> dict[str, str]:
    """Of each tensor that has an entry for each token, which sequence it goes along with.

    In the padding all its entries are the same, -100 among labels: nothing is lost without them.
    """
    found = {}
    for name, tensor in batch.items():
        is_decoder = DECODER in sequences and (name.startswith("decoder_") or name == "labels")
        which = DECODER if is_decoder else INPUT
        if which not in sequences or tensor.is_floating_point() or tensor.ndim < 2:
            continue
        if tensor.shape[1] != sequences[which].length:
            continue
        padding = tensor[padding_of(sequences[which]).to(tensor.device)]
        fill = _IGNORED if name == "labels" else padding.flatten()[:1]
        if bool((padding == fill).all()):
            found[name] = which
    return found


def padding_of(sequences: Sequences) -> Tensor:
    """True where a batch is padded, shape (examples, length)."""
    at = torch.arange(sequences.length)
    spans = torch.tensor(sequences.spans)
    return (at < spans[:, :1]) | (at >= spans[:, 1:])


def cut(batch: Batch, kinds: Mapping[str, str], which: str, spans: slice) -> dict[str, Tensor]:
    """The batch with the tokens in `spans` of one sequence alone."""
    return {name: value[:, spans].contiguous() if kinds.get(name) == which else value for name, value in batch.items()}


def rows_of(batch: Batch, at: Sequence[int]) -> dict[str, Tensor]:
    """Some examples of a batch, as a batch."""
    return {name: value[list(at)] for name, value in batch.items()}


def keys_of(batch: Batch, sequences: Mapping[str, Sequences], kinds: Mapping[str, str]) -> list[bytes]:
    """A digest of each example: of all that the model gets of it, whatever it is padded to in this batch."""
    size = len(next(iter(batch.values())))
    digests = [hashlib.blake2b(digest_size=16) for _ in range(size)]
    for name in sorted(batch):
        tensor = batch[name].detach().cpu().contiguous()
        for at, digest in enumerate(digests):
            row = tensor[at]
            if name in kinds:
                first, after = sequences[kinds[name]].spans[at]
                row = row[first:after]
            digest.update(f"{name} {row.dtype} {list(row.shape)};".encode())
            digest.update(row.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return [digest.digest() for digest in digests]
