"""A digest of weights, by which an adapter knows the base model that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_known: ContextVar[WeakTensorKeyDictionary | None] = ContextVar("_known", default=None)


def fingerprint(weights: Iterable[torch.Tensor]) -> str | None:
    """The dtypes of `weights` and a digest of their values, shapes and dtypes: `"float32:2b1f..."`.

    Names and order do not count, so transformers may rename and reorder modules; nor does the device.

    Returns:
        None if some of the values are not here to be read: on the meta device (offloaded, not loaded yet), sharded
        over processes, or none at all.

    Example:
        >>> fingerprint([torch.zeros(2)])
        'float32:6a44ef43e4ee6e5ae86a2c2cd6dd7e9a'
    """
    weights = list(weights)
    if not weights or not all(_is_here(weight.detach()) for weight in weights):
        return None
    known = _known.get()
    if known is None:
        digests = _digests(weights)
    else:
        unread = [weight for weight in weights if weight not in known]
        known.update(zip(unread, _digests(unread), strict=True))
        digests = [known[weight] for weight in weights]
    dtypes = sorted({_name(weight.dtype) for weight in weights})
    return f"{'+'.join(dtypes)}:{hashlib.sha256(b''.join(sorted(digests))).hexdigest()[:32]}"


@contextmanager
def each_read_once() -> Iterator[WeakTensorKeyDictionary]:
    """Inside, fingerprints read a weight once: for many of them, of weights that nothing changes meanwhile.

    Returns:
        The digests, by weight; that of a copy may be added.

    Example:
        >>> with each_read_once():
        ...     fingerprints = [fingerprint(weights[:count]) for count in range(1, len(weights))]
    """
    known = WeakTensorKeyDictionary()
    token = _known.set(known)
    try:
        yield known
    finally:
        _known.reset(token)


def differ_in_dtype(one: str, other: str) -> bool:
    """True if two fingerprints are of different dtypes, so that they say nothing about the values."""
    return one.partition(":")[0] != other.partition(":")[0]


def _is_here(weight: torch.Tensor) -> bool:
    # DTensor and torchao's tensors are subclasses; ZeRO-3 leaves an empty tensor behind
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and not weight.is_meta and weight.numel() > 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digests(weights: list[torch.Tensor]) -> list[bytes]:
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashlib lets other threads run meanwhile
        return list(pool.map(_digest, [weight.detach() for weight in weights]))


def _digest(weight: torch.Tensor) -> bytes:
    head = f"{_name(weight.dtype)}{list(weight.shape)}".encode()
    flat = weight.cpu().contiguous().reshape(-1)  # a scalar has no bytes to view
    digest = hashlib.sha256(head)
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
