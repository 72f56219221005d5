"""The hooks by which a model does not run its frozen start for an example that it has seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..blocks.unwrap import unwrap_model
from ..criteria.short_training.frozen_prefix import answering, recording
from ..errors import SurgicalError
from .examples import NOT_INPUTS, Batch, Sequences, aligned, keys_of, sequences_of, tensors_of
from .plan import Plan, Trial, are_close
from .store import Store

_PLANS = 8  # ways of calling a model that are tried out; training, evaluation and their last batches are a few
_CHECKED = 256  # of so many batches that need not run one does, to be compared


class PrefixCache:
    """Keeps what the modules before the first tuned block return, and does not run them again for the same example.

    `cache_prefix` makes it. It is inside the model, whatever calls that: `Trainer` with shuffling, accumulation and
    evaluation, several processes, a loop of yours.

    Attributes:
        store: where outputs are kept.
        hits, misses: batches for which the start of the model was not run, and for which it was.
        reason: why nothing is skipped, or None.
        temporary: the folder of the store, where it ends with the cache.
    """

    def __init__(self, model: nn.Module, store: Store, *, strict: bool = True, examples: int | None = None) -> None:
        self.store, self.hits, self.misses = store, 0, 0
        self.reason: str | None = None
        self._model: nn.Module | None = unwrap_model(model)
        self._strict, self._examples = strict, examples
        self._plans: dict[Any, Plan | None] = {}
        self._versions: dict[Any, list[tuple[int, int]]] = {}
        self.temporary: TemporaryDirectory[str] | None = None
        self._is_planning = False
        self._known: set[bytes] = set()
        self._during = ExitStack()
        self._after: Callable[[], None] | None = None
        self._hooks = [
            self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": None}  # a copy of the model runs whole

    def row_bytes(self, example: dict[str, Any]) -> int:
        """What is kept of an example, a batch of one, by the first plan that was made."""
        plan = next((plan for plan in self._plans.values() if plan), None)
        padded = self._sequences(tensors_of(example)[0])
        return sum(plan.forms[name].row_bytes(padded) for name in plan.spaces) if plan else 0

    def _sequences(self, batch: Batch) -> dict[str, Sequences]:
        is_two = getattr(getattr(self._model, "config", None), "is_encoder_decoder", False)
        return sequences_of(batch, bool(is_two))

    def close(self) -> None:
        """Write what waits to be written, and leave the model as it was."""
        self._during.close()
        for hook in self._hooks:
            hook.remove()
        if self.temporary:
            self.temporary.cleanup()
        else:
            self.store.flush()

    def _before_forward(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if module is not self._model or self._is_planning or self._after:
            return None
        if args:
            return self._refuse("the model is called with arguments that have no names")
        if getattr(module, "_is_replica", False) or torch.compiler.is_compiling():
            return self._refuse("the model is compiled, or replicated by nn.DataParallel")
        if given.get("use_cache"):
            return None  # generation: the layers leave keys and values behind
        batch, reason = tensors_of(given)
        if reason:
            return self._refuse(reason)
        padded = self._sequences(batch)
        kinds = aligned(batch, padded)
        plan = self._plan(given, batch, kinds)
        if plan is None:
            return None
        keys = keys_of(batch, padded, kinds)
        if module.training and self._examples is not None:
            self._known.update(keys)
            if len(self._known) > self._examples:
                return self._stop(
                    f"the inputs do not repeat, there are more than the {self._examples} examples (random "
                    "augmentation, or masks that the collator draws)"
                )
        return self._skip_or_keep(plan, keys, padded, next(iter(batch.values())).device)

    def try_on(self, wrapped: nn.Module, batch: dict[str, Any]) -> None:
        """Make the plan for training on such batches.

        Raises:
            SurgicalError: nothing can be skipped.
        """
        model = self._model
        assert model is not None
        modes = [(module, module.training) for module in model.modules()]
        try:
            wrapped.train()
            self._before_forward(model, (), batch)
        finally:
            self._during.close()
            self._after = None
            self.hits = self.misses = 0
            for module, mode in modes:
                module.training = mode

    def _skip_or_keep(
        self, plan: Plan, keys: Sequence[bytes], padded: Mapping[str, Sequences], device: torch.device
    ) -> None:
        kept = self._recall(plan, keys, padded, device)
        if kept is not None and self.hits % _CHECKED:
            self.hits += 1
            self._during.enter_context(answering(plan.answers(kept, len(keys), padded)))
            self._after = lambda: None
            return
        outputs: dict[nn.Module, Any] = {}
        self._during.enter_context(recording([plan.skipped[name] for name in plan.spaces], outputs))

        def keep() -> None:
            for name, space in plan.spaces.items():
                module = plan.skipped[name]
                if module not in outputs:
                    return
                rows = plan.forms[name].rows(outputs[module], padded)
                if kept is not None:
                    self._check(name, plan, kept, outputs[module], padded)
                if self._model is None:
                    return
                for key, row in zip(keys, rows or (), strict=False):
                    self.store.rows(space).put(key, row)

        if kept is not None:
            self.hits += 1
        else:
            self.misses += 1
        self._after = keep

    def _recall(
        self, plan: Plan, keys: Sequence[bytes], padded: Mapping[str, Sequences], device: torch.device
    ) -> dict[str, Any] | None:
        outputs = {}
        for name, space in plan.spaces.items():
            store = self.store.rows(space)
            missing = [key not in store for key in keys]
            if not all(missing):  # a new epoch, in which other processes get what this one has
                store.flush()
            if any(missing):
                store.refresh()
            rows = [store.get(key) for key in keys]
            known = [row for row in rows if row is not None]
            output = plan.forms[name].output(known, padded, device) if len(known) == len(rows) else None
            if output is None:
                return None
            outputs[name] = output
        return outputs

    def _check(
        self, name: str, plan: Plan, kept: Mapping[str, Any], output: Any, padded: Mapping[str, Sequences]
    ) -> None:
        form = plan.forms[name]
        pairs = zip(form.rows(kept[name], padded) or [], form.rows(output, padded) or [], strict=True)
        if not all(are_close(one, other) for one, other in pairs):
            self._stop("what it has is not what the model returns: a weight before the first tuned block has changed")

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        if module is not self._model or self._is_planning or self._after is None:
            return None
        after, self._after = self._after, None
        self._during.close()
        if output is None:  # it raised
            return None
        after()
        if isinstance(output, ModelOutput) and output.get("past_key_values") is not None:
            # The layers that were not run have put nothing there.
            return type(output)(**{name: value for name, value in output.items() if name != "past_key_values"})
        return None

    def _plan(self, given: dict[str, Any], batch: dict[str, Tensor], kinds: Mapping[str, str]) -> Plan | None:
        way = self._way(given, batch, kinds)
        plan = self._plans.get(way)
        if plan is not None and self._versions[way] != plan.versions():  # the start was trained, or exchanged
            del self._plans[way]
        if way not in self._plans:
            if len(self._plans) >= _PLANS:
                return None
            self._is_planning = True
            try:
                assert self._model is not None
                self._plans[way] = plan = Trial(self._model, given, batch).plan()
                self._versions[way] = plan.versions()
            except SurgicalError as error:
                self._plans[way] = None
                self._refuse(str(error))
            finally:
                self._is_planning = False
        return self._plans[way]

    def _way(self, given: dict[str, Any], batch: dict[str, Tensor], kinds: Mapping[str, str]) -> Any:
        """What a plan is for: the mode, the precision, what is trained, the arguments and their shapes."""
        assert self._model is not None
        device = next(iter(batch.values())).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        trained = tuple(weight.requires_grad for weight in self._model.parameters())
        shapes = tuple(
            (name, value.dtype, tuple(value.shape[2 if name in kinds else 1 :]), kinds.get(name))
            for name, value in sorted(batch.items())
        )
        others = tuple((name, str(value)) for name, value in sorted(given.items()) if name not in batch)
        others = tuple(pair for pair in others if pair[0] not in NOT_INPUTS)
        return self._model.training, torch.is_grad_enabled(), autocast, trained, shapes, others

    def _refuse(self, reason: str) -> None:
        """Nothing is skipped in this way of calling the model; if in none so far, that is an error."""
        self.reason = self.reason or reason
        if self._strict and not any(self._plans.values()):
            raise SurgicalError(f"the prefix cache cannot be used: {reason}")

    def _stop(self, reason: str) -> None:
        """Skip nothing from now on."""
        warnings.warn(f"the prefix cache is used no more: {reason}.", stacklevel=2)
        self.reason, self._model = reason, None
        self.store.clear()
