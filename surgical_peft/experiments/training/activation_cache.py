"""The outputs of a model's frozen start for each example: computed once, for all trainings above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.block_map import BlockMap
from ...blocks.unwrap import PARKED
from ...criteria.short_training.frozen_prefix import Prefix, answering, recording

ROOM = 2 * 2**30  # bytes; a search keeps no more activations than that
_FEW = 4  # examples on which skipping is tried out
AT = "at"  # the key of a batch that says which examples it holds


class PrefixCache:
    """The outputs of a model's blocks for every example of a data set, so that the frozen ones need not run again.

    A training of copies of some blocks skips all modules that returned before the first of those was called: nothing
    in training can change what they return. What it gets instead is equal up to the rounding of another batch size.

    Left out are modules that return other things than tensors with one entry an example, or different ones in other
    company (batch statistics, routing with a capacity). Before a training skips anything, a few examples go through
    the whole model in train mode: what is kept must be what the blocks return, and loss and gradients must be the same
    without running them. Where they differ, because something between the blocks draws dropout, say, or reads what a
    block does besides returning, nothing is skipped.

    Memory: the outputs of all blocks for all examples, at most `ROOM` bytes.

    Args:
        model: in eval mode, with the weights that every training starts from.
        batches: all examples in their order, as the model takes them.
        precision: of autocast in the trainings; None without. Outputs are kept as they come, in 16 bits or 32.

    Attributes:
        known: for each module that can be skipped its output for all examples.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[dict[str, Tensor]], precision: torch.dtype | None = None
    ) -> None:
        self._precision = precision
        modules = _modules_of_blocks(model)
        names = {module: name for name, module in modules.items()}
        self._record(model, modules, batches)
        again = Prefix(model, list(modules.values()))
        whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        mixed = torch.arange(0, len(next(iter(whole.values()))), max(2, len(batches)))  # in other company
        self._few = mixed[:_FEW], {key: value[mixed[:_FEW]] for key, value in whole.items()}
        with torch.no_grad(), autocast(model, precision), again.of(0):
            model(**{key: value[mixed] for key, value in whole.items()})
        for module, output in again.outputs[0].items():
            if names[module] in self.known and not self._is_close(self._recall(names[module], mixed), output):
                del self.known[names[module]]

    def _record(self, model: nn.Module, modules: dict[str, nn.Module], batches: Sequence[dict[str, Tensor]]) -> None:
        prefix = Prefix(model, list(modules.values()))
        with torch.no_grad():
            for number, batch in enumerate(batches):
                with autocast(model, self._precision), prefix.of(number):
                    model(**batch)
        sizes = [len(next(iter(batch.values()))) for batch in batches]
        order = dict(model.named_modules())
        self._called = {name: prefix.called[module] for name, module in order.items() if module in prefix.called}
        self._returned: dict[str, int] = {}
        self.known: dict[str, Any] = {}
        for name, module in modules.items():
            if module in prefix.unfit or module not in prefix.returned:
                continue
            parts = [outputs.pop(module) for outputs in prefix.outputs.values()]
            if all(_is_by_example(part, size) for part, size in zip(parts, sizes, strict=True)) and _is_alike(parts):
                self.known[name] = _zip_map(torch.cat, parts)
                self._returned[name] = prefix.returned[module]

    def _recall(self, name: str, at: Tensor) -> Any:
        return _zip_map(lambda tensors: tensors[0][at.to(tensors[0].device)], [self.known[name]])

    @contextmanager
    def skipping(self, wrapped: nn.Module, base: nn.Module, originals: dict[str, nn.Module]) -> Iterator[None]:
        """Training inside runs only what is above the frozen start; batches with the key `at` alone are cut short.

        Args:
            wrapped: `base` with an adapter in training; what is called.
            base: a copy of the model of which the outputs are known.
            originals: the modules of `base` by name, from before it was wrapped.
        """
        known = {id(module) for module in originals.values()}
        replaced = [self._called[n] for n, m in base.named_modules() if n in self._called and id(m) not in known]
        tuned = [self._first_call(name) for name, module in base.named_modules() if PARKED in module._modules]
        first = min([*replaced, *tuned], default=0)
        skipped = {name: originals[name] for name in self.known if self._returned[name] < first}
        answers = ExitStack()

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            at = kwargs.pop(AT, None)
            if at is not None:
                answers.enter_context(answering({skipped[name]: self._recall(name, at) for name in skipped}))
            return args, kwargs

        hooks = [
            wrapped.register_forward_pre_hook(enter, with_kwargs=True),
            wrapped.register_forward_hook(lambda *_: answers.close(), always_call=True),
        ]
        try:
            if skipped and not self._agrees(wrapped, skipped):
                skipped.clear()
            yield
        finally:
            answers.close()
            for hook in hooks:
                hook.remove()

    def _first_call(self, name: str) -> int:
        """The time of the first call of a module, or, of one whose weights others read, of the module around it."""
        while name and name not in self._called:
            name = name.rpartition(".")[0]
        return self._called.get(name, 0)

    def _agrees(self, wrapped: nn.Module, skipped: dict[str, nn.Module]) -> bool:
        """Compare outputs, loss and gradients of a few examples with and without what is skipped.

        Outputs differ by the rounding of another batch size; loss and gradients are compared where only running the
        blocks is left out, and so are equal whatever the precision.
        """
        at, batch = self._few
        weights = [weight for weight in wrapped.parameters() if weight.requires_grad]
        buffers = [(buffer, buffer.clone()) for buffer in wrapped.buffers()]  # running statistics, for one
        modes = [(module, module.training) for module in wrapped.modules()]
        outputs: dict[nn.Module, Any] = {}
        wrapped.train()

        def loss_and_gradients() -> list[Tensor]:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                with autocast(wrapped, self._precision):
                    loss = wrapped(**batch).loss
                return [loss.detach(), *torch.autograd.grad(loss, weights, materialize_grads=True)]

        try:
            with recording(skipped.values(), outputs):
                whole = loss_and_gradients()
            if not all(self._is_close(self._recall(name, at), outputs[skipped[name]]) for name in skipped):
                return False
            try:
                with answering(outputs):
                    short = loss_and_gradients()
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception:  # whatever a model does that does not find what its blocks leave behind
                return False
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        losses, *gradients = zip(whole, short, strict=True)
        scale = max((float(gradient.abs().max()) for _, gradient in gradients if gradient.numel()), default=0.0)
        return _all_close(*losses) and all(_all_close(one, other, scale) for one, other in gradients)

    def _is_close(self, one: Any, other: Any) -> bool:
        """They differ by rounding only: no vector of the last dimension by more than a share of its mean size.

        The largest value is no measure: in language models a few are a thousand times the others.
        """
        share = 1e-3 if self._precision is None else 5e-2
        for a, b in zip(_tensors(one), _tensors(other), strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                return False
            size, error = b.float().abs(), (a.float() - b.float()).abs()
            if not bool((error.mean(-1) <= share * (size.mean(-1) + 1e-2 * size.mean())).all()):
                return False
        return True

    @staticmethod
    def fits(model: nn.Module, batch: dict[str, Tensor], count: int, precision: torch.dtype | None = None) -> bool:
        """Run one batch to tell if the outputs for `count` such examples take up no more than `ROOM`."""
        modules = _modules_of_blocks(model)
        prefix = Prefix(model, list(modules.values()))
        with torch.no_grad(), autocast(model, precision), prefix.of(0):
            model(**batch)
        size = sum(tensor.nbytes for output in prefix.outputs[0].values() for tensor in _tensors(output))
        return size / len(next(iter(batch.values()))) * count <= ROOM


def autocast(model: nn.Module, precision: torch.dtype | None) -> torch.autocast:
    """The context that Trainer runs a model's forward pass in; None: as it is."""
    return torch.autocast(next(model.parameters()).device.type, dtype=precision, enabled=precision is not None)


def _modules_of_blocks(model: nn.Module) -> dict[str, nn.Module]:
    every = dict(model.named_modules())
    blocks = BlockMap.find(model).modules.values()
    return {name: every[name] for names in blocks for name in names if name in every}


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    for member in output if isinstance(output, tuple | list) else ():
        yield from _tensors(member)


def _is_by_example(output: Any, size: int) -> bool:
    tensors = list(_tensors(output))
    return bool(tensors) and all(tensor.ndim > 0 and tensor.shape[0] == size for tensor in tensors)


def _is_alike(parts: Sequence[Any]) -> bool:
    """All parts have one structure, and tensors of one shape but for the number of examples."""
    shapes = {str(_zip_map(lambda tensors: tuple(tensors[0].shape[1:]), [part])) for part in parts}
    return len(shapes) == 1


def _all_close(one: Any, other: Any, scale: float | None = None) -> bool:
    """They differ by rounding only, relative to their own values and to `scale`; default their largest."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4 * (float(b.abs().max()) if scale is None else scale))
        for a, b in pairs
    )


def _zip_map(function: Callable[[list[Tensor]], Any], parts: Sequence[Any]) -> Any:
    """`function` of the tensors at each place of outputs with one structure; None stays None."""
    first = parts[0]
    if type(first) in (tuple, list):
        return type(first)(_zip_map(function, members) for members in zip(*parts, strict=True))
    return None if first is None else function(list(parts))
