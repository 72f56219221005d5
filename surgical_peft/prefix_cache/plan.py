"""Which modules a training need not run, what must be kept instead, and a trial that shows that it is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_map import BlockMap
from ..blocks.unwrap import named_bare_modules
from ..criteria.short_training.frozen_prefix import answering
from ..errors import SurgicalError
from .examples import Batch, Sequences, aligned, cut, rows_of, sequences_of
from .outputs import Form, tensors_in
from .trace import Trace, random_modules

_FEW = 4  # examples on which skipping is tried out


@dataclass(frozen=True)
class Plan:
    """What is skipped in one way of calling a model.

    Attributes:
        skipped: modules that are not run, by name, the outermost of those that are not.
        forms: of their outputs.
        spaces: for each whose output others read, and which is kept therefore, what that output depends on.
        weights: the weights and buffers that the outputs depend on.
    """

    skipped: dict[str, nn.Module]
    forms: dict[str, Form]
    spaces: dict[str, str]
    weights: list[Tensor]

    def versions(self) -> list[tuple[int, int]]:
        """Numbers that change when the weights do."""
        return [(weight.data_ptr(), weight._version) for weight in self.weights if not weight.is_inference()]

    def answers(self, kept: Mapping[str, Any], size: int, padded: Mapping[str, Sequences]) -> dict[nn.Module, Any]:
        """What each skipped module returns for a batch of `size` examples."""
        return {
            module: kept[name] if name in kept else self.forms[name].unknown(size, padded)
            for name, module in self.skipped.items()
        }


def watched_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the blocks, and those around them: what may be skipped, by name."""
    every = dict(named_bare_modules(model))
    blocks = {name for names in BlockMap.find(model).modules.values() for name in names if name in every}
    around = {".".join(parts[:end]) for name in blocks for parts in [name.split(".")] for end in range(1, len(parts))}
    return {name: module for name, module in every.items() if name and name in blocks | around}


class Trial:
    """A few examples, and the forward passes on them that show what may be skipped.

    Args:
        model: the bare model, in the mode and under the autocast in which it will be called.
        given: all its arguments.
        batch: the tensors among them.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any], batch: Batch) -> None:
        self.model = model
        self.others = {name: value for name, value in given.items() if name not in batch}
        self.is_two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        padded = sequences_of(batch, self.is_two)
        sizes = [
            sum(after - first for first, after in spans)
            for spans in zip(*(s.spans for s in padded.values()), strict=True)
        ]
        count = len(next(iter(batch.values())))
        order = sorted(range(count), key=sizes.__getitem__) if sizes else list(range(count))
        few = [*order[: _FEW // 2], *order[_FEW // 2 :][-_FEW // 2 :]]
        self.few = rows_of(batch, few if len(few) > 1 else [*few, *few])  # one would not tell what is by example
        self.size = len(next(iter(self.few.values())))
        self.padded = sequences_of(self.few, self.is_two)
        self.kinds = aligned(self.few, self.padded)
        self.watched = watched_modules(model)

    def plan(self) -> Plan:
        """What can be skipped when the model is called like this.

        Raises:
            SurgicalError: nothing, with the reason.
        """
        trace = Trace(self.model, self.watched)
        whole = self.run(self.few, trace=trace)
        skipped = self._outermost(trace)
        forms, misfits = self.forms(trace, skipped)
        for name in skipped:
            if drawing := random_modules(self.watched[name]):
                misfits[name] = (
                    f"{name}.{drawing[0]} below the first tuned block draws or counts while it runs "
                    f"({type(self.watched[name].get_submodule(drawing[0])).__name__} in train mode), so its output is "
                    "another one each time: leave frozen_eval on, or put it into eval mode."
                )
        sizes = {name: sum(weight.numel() for weight in self.watched[name].parameters()) for name in skipped}
        if misfits and 2 * sum(sizes[name] for name in misfits) > sum(sizes.values()):  # the rest is not worth it
            raise SurgicalError(next(iter(misfits.values())))
        skipped = [name for name in skipped if name not in misfits]
        weights = trace.tensors_before(max(trace.returned[name] for name in skipped))
        modules = {name: self.watched[name] for name in skipped}
        outputs = {name: trace.outputs[name] for name in skipped}
        for kept in self._choices(modules, forms, outputs, whole, trace):
            plan = Plan(modules, forms, kept, weights)
            if self._agrees(plan, outputs, whole):
                return plan
        raise SurgicalError(
            f"{type(self.model).__name__} computes something else where the blocks before the first tuned one are not "
            "run: something reads what they do besides returning, or the loss counts padding."
        )

    def run(
        self, batch: Batch, trace: Trace | None = None, answers: dict[nn.Module, Any] | None = None, seed: int = 0
    ) -> list[Tensor]:
        """All numbers that a forward pass gives, then the gradients of what is in training."""
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        devices = [weight.device for weight in weights[:1] if weight.device.type != "cpu"]
        with _buffers_as_before(self.model):  # the backward pass of batch statistics reads them, too
            with (
                torch.random.fork_rng(devices),
                trace.watching() if trace else nullcontext(),
                answering(answers or {}),
            ):
                torch.manual_seed(seed)
                output = self.model(**batch, **self.others)
            return self._numbers(output, weights)

    def _numbers(self, output: Any, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """The numbers of an output and the gradients of its loss."""
        numbers = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            loss = sum(tensor.float().square().mean() for tensor in numbers if tensor.requires_grad)
        elif any(span != (0, s.length) for s in self.padded.values() for span in s.spans):
            numbers = [loss]  # what stands at the padding may be anything
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            return [number.detach() for number in numbers]
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        return [*(number.detach() for number in numbers), *gradients]

    def is_by_example(self, output: Any) -> bool:
        """True if all tensors of an output for the few examples have an entry for each."""
        tensors = list(tensors_in(output))
        return bool(tensors) and all(tensor.ndim and len(tensor) == self.size for tensor in tensors)

    def _outermost(self, trace: Trace) -> list[str]:
        """Modules that had returned before the first tuned one was called, and whose outputs can be kept."""
        first = trace.first_tuned()
        before = [name for name in self.watched if trace.returned.get(name, first) < first]
        reasons = dict(trace.unfit)
        for name in before:
            if name in trace.outputs and not self.is_by_example(trace.outputs[name]):
                reasons[name] = "returns tensors that have no entry for each example"
        fit = [name for name in before if name not in reasons]
        skipped = [name for name in fit if not any(name.startswith(f"{other}.") for other in fit)]
        if not skipped:
            why = "".join(f" {name} {reasons[name]}." for name in before if name in reasons)
            raise SurgicalError(
                f"nothing of {type(self.model).__name__} runs before its first tuned block that could be kept.{why} "
                "Tune later blocks, or leave the prefix cache off."
            )
        return skipped

    def forms(self, trace: Trace, names: Sequence[str]) -> tuple[dict[str, Form], dict[str, str]]:
        """Forms of the outputs that an example has whatever its batch, and the reasons why others are not the same."""
        misfits: dict[str, str] = {}
        try:
            forms = self._shapes(trace, names, misfits)
            self._check_company(trace.outputs, forms, misfits)
        except (SurgicalError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model does not like about fewer tokens, or fewer examples
            raise SurgicalError(
                f"{type(self.model).__name__} does not take a part of a batch, so that examples cannot be told apart: "
                f"{error}"
            ) from error
        return {name: form for name, form in forms.items() if name not in misfits}, misfits

    def _shapes(self, trace: Trace, names: Sequence[str], misfits: dict[str, str]) -> dict[str, Form]:
        """Which dimension of which output goes along with which sequence: the one that is shorter by a token too."""
        found: dict[str, list[str | None]] = {name: [None for _ in tensors_in(trace.outputs[name])] for name in names}
        for which in {*self.kinds.values()}:
            shorter = Trace(self.model, {name: self.watched[name] for name in names})
            batch = cut(self.few, self.kinds, which, slice(0, self.padded[which].length - 1))
            with torch.no_grad():
                self.run(batch, trace=shorter)
            for name in names:
                pairs = zip(tensors_in(trace.outputs[name]), tensors_in(shorter.outputs[name]), strict=True)
                for at, (whole, part) in enumerate(pairs):
                    changed = [d for d, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
                    if changed and (changed != [1] or whole.shape[1] != self.padded[which].length):
                        misfits[name] = f"the output of {name} has another shape than an entry for each token."
                    found[name][at] = which if changed else found[name][at]
        return {name: Form.of(trace.outputs[name], found[name]) for name in names if name not in misfits}

    def _check_company(self, outputs: Mapping[str, Any], forms: Mapping[str, Form], misfits: dict[str, str]) -> None:
        """The outputs are the same at every pass, and for an example in other company and other padding."""
        again, alone = (Trace(self.model, {name: self.watched[name] for name in forms}) for _ in range(2))
        shortest = rows_of(self.few, [0])
        for which in {*self.kinds.values()}:
            shortest = cut(shortest, self.kinds, which, slice(*self.padded[which].spans[0]))
        with torch.no_grad():
            self.run(self.few, trace=again, seed=1)
            self.run(shortest, trace=alone, seed=2)
        padded = sequences_of(shortest, self.is_two)
        for name, form in forms.items():
            pairs = zip(tensors_in(outputs[name]), tensors_in(again.outputs[name]), strict=True)
            rows, single = form.rows(outputs[name], self.padded), form.rows(alone.outputs[name], padded)
            if not all(torch.equal(one, other) for one, other in pairs):
                misfits[name] = f"{name} below the first tuned block draws at random: no output is like another."
            elif not rows or not single or not are_close(rows[0], single[0]):
                misfits[name] = (
                    f"what {name} returns for an example depends on the others of its batch, or on how it is padded "
                    "(on the left, without position_ids, for one)."
                )

    def _choices(
        self, modules: dict[str, nn.Module], forms: dict[str, Form], outputs: dict[str, Any], whole: Any, trace: Trace
    ) -> Iterator[dict[str, str]]:
        """What may be enough to be kept: the last output, or all that something else reads."""

        def spaces(names: list[str]) -> dict[str, str]:
            return {name: trace.space_of(name) for name in names}

        exact = [name for name in modules if any(not t.is_floating_point() for t in tensors_in(outputs[name]))]
        last = max(modules, key=trace.returned.__getitem__)
        yield spaces([*exact, *({last} - {*exact})])
        read = []
        for name in modules:
            without = dict.fromkeys([other for other in modules if other != name], "")
            if name in exact or not self._agrees(Plan(modules, forms, without, []), outputs, whole):
                read.append(name)
        yield spaces(read)
        yield spaces(list(modules))

    def _agrees(self, plan: Plan, outputs: Mapping[str, Any], whole: Sequence[Tensor]) -> bool:
        """Compare with a pass that does not run what is skipped: it gets the same numbers, but for the padding."""
        device = next(iter(self.few.values())).device
        kept = {}
        for name in plan.spaces:
            rows = plan.forms[name].rows(outputs[name], self.padded)
            kept[name] = plan.forms[name].output(rows or [], self.padded, device)
        try:
            short = self.run(self.few, answers=plan.answers(kept, self.size, self.padded))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a model does that does not find what its blocks leave behind
            return False
        scale = max((float(number.abs().max()) for number in whole if number.numel()), default=0.0)
        return len(short) == len(whole) and all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5 * scale)
            for a, b in zip(short, whole, strict=True)
        )


def are_close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """They differ by rounding only: no vector of the last dimension by more than a share of its mean size.

    The largest value is no measure: in language models a few are a thousand times the others.
    """
    kinds = {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}
    is_rough = any(torch.is_autocast_enabled(kind) for kind in kinds)
    for a, b in zip(one, other, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return False
            continue
        share = 5e-2 if is_rough or torch.finfo(a.dtype).bits == 16 else 1e-3
        size, error = b.float().abs(), (a.float() - b.float()).abs()
        if not bool((error.mean(-1) <= share * (size.mean(-1) + 1e-2 * size.mean())).all()):
            return False
    return True


@contextmanager
def _buffers_as_before(model: nn.Module) -> Iterator[None]:
    """Running statistics, for one, are afterwards what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
