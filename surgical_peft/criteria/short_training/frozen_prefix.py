"""The frozen start of a model, run once for each batch and not at every step of every short training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


class Prefix:
    """Caches the outputs of the repeated layers and skips the layers that no weight in training can change.

    A layer is skipped if it had returned before the first module that holds a weight in training was called: then no
    such weight has a part in its output, whatever the architecture. Layers called more than once, or that return other
    things than tensors in tuples and lists, are always run.

    Memory: the outputs of all repeated layers for all batches.

    Attributes:
        outputs: for each batch what each layer returned.
        called, returned: when each module was first called, and when each layer returned, on one count.
        unfit: layers that are always run.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model = model
        self.layers = layers
        self.outputs: dict[int, dict[nn.Module, Any]] = {}
        self.called: dict[nn.Module, int] = {}  # when each module was first called
        self.returned: dict[nn.Module, int] = {}  # when each layer returned
        self.unfit: set[nn.Module] = set()
        self._skipped: Sequence[nn.Module] = ()
        self._training = False

    @contextmanager
    def of(self, at: int) -> Iterator[None]:
        """The forward pass of batch `at` is inside: its layers are skipped, or run and remembered."""
        if self._training:
            skipped = self._skipped if at in self.outputs else ()
            with answering({layer: _kept(self.outputs[at][layer]) for layer in skipped}):
                yield
        elif at in self.outputs:
            yield
        else:
            outputs: dict[nn.Module, Any] = {}
            hooks = [module.register_forward_pre_hook(self._call) for module in self.model.modules()]
            hooks += [layer.register_forward_hook(partial(self._return, outputs)) for layer in self.layers]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()
            self.outputs[at] = outputs

    @contextmanager
    def skipping(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """These weights are in training inside, all others are as they were when outputs were remembered."""
        self._skipped = self.before(weights)
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def before(self, weights: Sequence[nn.Parameter]) -> list[nn.Module]:
        """The layers that can be skipped while these weights are in training, once outputs are remembered."""
        trained = {id(weight) for weight in weights}
        holders = [m for m in self.model.modules() if any(id(p) in trained for p in m.parameters(recurse=False))]
        first = min((self.called.get(module, 0) for module in holders), default=0)
        return [layer for layer in self.layers if layer not in self.unfit and self.returned.get(layer, first) < first]

    def _call(self, module: nn.Module, args: Any) -> None:
        self.called.setdefault(module, len(self.called) + len(self.returned))

    def _return(self, outputs: dict[nn.Module, Any], layer: nn.Module, args: Any, output: Any) -> None:
        if layer in outputs or not _is_plain(output):
            self.unfit.add(layer)
        outputs[layer] = _kept(output)
        self.returned.setdefault(layer, len(self.called) + len(self.returned))


@contextmanager
def answering(answers: dict[nn.Module, Any]) -> Iterator[None]:
    """Inside, these modules return the given outputs instead of running."""
    before = {module: module.__dict__.get("forward") for module in answers}
    for module, answer in answers.items():
        module.__dict__["forward"] = partial(_answer, answer)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


@contextmanager
def recording(modules: Iterable[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Inside, what these modules return goes into `outputs` as well."""

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = _kept(output)

    hooks = [module.register_forward_hook(remember) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _answer(answer: Any, *args: Any, **kwargs: Any) -> Any:
    return answer


def _is_plain(output: Any) -> bool:
    if type(output) in (tuple, list):
        return all(_is_plain(part) for part in output)
    return output is None or isinstance(output, Tensor)


def _kept(output: Any) -> Any:
    if type(output) in (tuple, list):
        return type(output)(_kept(part) for part in output)
    return output.detach().clone() if isinstance(output, Tensor) else output  # some models go on in place
