"""`cache_prefix`: run a model's frozen start once for each example, in any training loop."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..errors import SurgicalError
from ..scoring.batches import to_device
from ..scoring.distributed import broadcast_from_first, several
from .cache import PrefixCache
from .examples import keys_of, tensors_of
from .store import Store

MEMORY = 2 * 2**30  # bytes of outputs that are held in memory unless told otherwise
_SAMPLE = 1000  # examples from which the size of all is told


def cache_prefix(
    model: nn.Module,
    batches: DataLoader[Any] | None = None,
    *,
    memory: int = MEMORY,
    folder: str | Path | None = None,
) -> PrefixCache:
    """Run what lies before the first tuned block once for each example, not at every step.

    Call it when the blocks are chosen, before training, with any adapter or with weights frozen by hand. From the
    second epoch on a step runs only what is tuned and what comes after. Inputs must repeat: the same images, the same
    tokens. Examples are known by a digest of all their inputs, and what is kept by one of the weights that computed
    it, so what another model, processor or data set has left behind is never used.

    Memory: for each example what one block returns, `tokens x width` numbers as they come (float32, or bfloat16 under
    autocast).

    Args:
        model: bare or wrapped by PEFT, on the device where it is trained.
        batches: the loader of the training, such as `trainer.get_train_dataloader()`. With it, what cannot work is
            refused now; without, at the first step.
        memory: bytes that may be held in memory. With several processes nothing is: examples go from one to another.
        folder: where to keep what is beyond that, in safetensors files that are mapped into memory; a later run with
            the same folder uses them. Default is a temporary one.

    Returns:
        The cache; `close()` ends it and leaves the model as it was, as does the end of a `with` block.

    Raises:
        SurgicalError: nothing can be skipped: the first block is tuned, dropout is on before the first tuned one
            (`frozen_eval=False`), examples are augmented at random, or what a block returns depends on other examples.

    Example:
        >>> with cache_prefix(model, trainer.get_train_dataloader()):
        ...     trainer.train()
    """
    if memory < 0:
        raise SurgicalError(f"memory={memory} is no number of bytes: 0 or more.")
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise SurgicalError(f"{str(folder)!r} is a file: give a folder for the prefix cache.")
    temporary = None
    if folder is None:
        temporary = TemporaryDirectory(prefix="surgical-prefix-", ignore_cleanup_errors=True)
        folder = broadcast_from_first(temporary.name)
    store = Store(0 if several() else memory, Path(folder))
    examples = None if batches is None else _count(batches)
    cache = PrefixCache(model, store, examples=examples)
    cache.temporary = temporary
    if batches is not None:
        try:
            _try_on(cache, model, batches)
        except BaseException:
            cache.close()
            raise
    return cache


def predicted_bytes(cache: PrefixCache, batches: DataLoader[Any]) -> int:
    """What a cache that was tried on this loader will keep of all its examples; from a thousand where there are more.

    Files take about a hundred bytes an example more, for names and shapes.
    """
    data: Any = batches.dataset
    collate: Any = batches.collate_fn
    at = sorted({round(number * (len(data) - 1) / _SAMPLE) for number in range(_SAMPLE + 1)})
    with _random_states_as_before():
        sizes = [cache.row_bytes(dict(collate([data[index]]))) for index in at]
    return round(sum(sizes) / len(sizes) * len(data))


def _count(batches: DataLoader[Any]) -> int:
    data: Any = batches.dataset
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise SurgicalError(f"the prefix cache needs a data set that can be indexed, not a {type(data).__name__}.")
    return len(data)


@contextmanager
def _random_states_as_before() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _try_on(cache: PrefixCache, model: nn.Module, batches: DataLoader[Any]) -> None:
    """Refuse what cannot work before training begins, by a few examples that are made twice."""
    data: Any = batches.dataset
    collate: Any = batches.collate_fn
    at = sorted({0, len(data) // 3, 2 * len(data) // 3, len(data) - 1})
    made = []
    with _random_states_as_before():
        for _ in range(2):
            items = [collate([data[index]]) for index in at]
            made.append([digest for batch in items for digest in keys_of(tensors_of(batch)[0], {}, {})])
        batch = to_device(collate([data[index] for index in at]), model)
    if made[0] != made[1]:
        raise SurgicalError(
            "the prefix cache cannot be used: an example is another one each time that it is made (random "
            "augmentation, or masks that the collator draws). Make the examples once, or leave the cache off."
        )
    cache.try_on(model, dict(batch))
