"""The outputs of all blocks of a model, kept beforehand for trainings of whichever of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..criteria.short_training.frozen_prefix import recording
from ..tuner.loading.fingerprint import each_read_once
from .examples import Batch, aligned, keys_of, sequences_of
from .plan import Trial
from .store import Store
from .trace import Trace


class AllBlocks:
    """Runs a model and keeps what each of its blocks returns, where that is the same whatever is beside an example.

    Args:
        model: the bare model in eval mode, with the weights that every training starts from.
        batch: a few examples.
        precision: of autocast in the trainings; None without.

    Attributes:
        row_bytes: what is kept of an example of `batch`, on average.

    Raises:
        SurgicalError: the model has no blocks, or does not take a part of a batch.
    """

    def __init__(self, model: nn.Module, batch: Batch, precision: torch.dtype | None = None) -> None:
        self._model, self._precision = model, precision
        with self._running():
            trial = Trial(model, batch, batch)
            trace = Trace(model, trial.watched)
            trial.run(trial.few, trace=trace)
            fit = [name for name, output in trace.outputs.items() if trial.is_by_example(output)]
            fit = [name for name in fit if name not in trace.unfit]
            self._forms, _ = trial.forms(trace, fit)
            with each_read_once():
                self._spaces = {name: trace.space_of(name) for name in self._forms}
        self._modules = {name: trial.watched[name] for name in self._forms}
        self._is_two = trial.is_two
        rows = [form.rows(trace.outputs[name], trial.padded) or [] for name, form in self._forms.items()]
        self.row_bytes = sum(tensor.nbytes for name in rows for row in name for tensor in row) / trial.size

    @contextmanager
    def _running(self) -> Iterator[None]:
        device = next(self._model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, dtype=self._precision, enabled=self._precision is not None):
            yield

    def keep(self, batch: Batch, store: Store) -> None:
        """Run the model on a batch, and keep what its blocks return for each example."""
        padded = sequences_of(batch, self._is_two)
        outputs: dict[nn.Module, Any] = {}
        with self._running(), recording(self._modules.values(), outputs):
            self._model(**batch)
        keys = keys_of(batch, padded, aligned(batch, padded))
        for name, form in self._forms.items():
            rows = form.rows(outputs[self._modules[name]], padded)
            for key, row in zip(keys, rows or (), strict=False):
                store.rows(self._spaces[name]).put(key, row)
