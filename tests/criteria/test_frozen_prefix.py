"""Layers whose outputs cannot have changed are skipped, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgical_peft import BlockMap
from surgical_peft.criteria.short_training.context import ScoringContext
from tests.support.toys import TOYS, Toy


def context_of(model: nn.Module, batches: list[Any], loss_fn: Any = None) -> ScoringContext:
    blocks = BlockMap.find(model)
    units = {block: dict(named) for block, named in blocks.named_parameters(model).items()}
    layers = [model.get_submodule(blocks.modules[name][0]) for stack in blocks.stacks.values() for name in stack]
    loss = loss_fn or (lambda model, batch: model(**batch).loss)
    return ScoringContext(model, units, {name: name for name in units}, layers, batches, loss)


def shift(context: ScoringContext, unit: str) -> dict[str, list[nn.Parameter]]:
    for weight in context.units[unit].values():
        weight.data.add_(0.1)
    return {}


def test_losses_with_changed_weights_are_those_of_a_whole_forward_pass(toy: Toy) -> None:
    batches = [toy.batch(seed) for seed in range(2)]
    model, plain = toy.model(), toy.model()
    context = context_of(model, batches)
    with torch.no_grad():
        for at in range(2):
            context.loss(at)
        for unit in context.units:
            plain.load_state_dict(toy.model().state_dict())
            shift(context_of(plain, batches), unit)
            with context.training(unit):
                shift(context, unit)
                for at, batch in enumerate(batches):
                    assert context.loss(at).item() == pytest.approx(plain(**batch).loss.item(), rel=1e-6), unit
    for (name, weight), (_, before) in zip(model.named_parameters(), toy.model().named_parameters(), strict=True):
        assert torch.equal(weight, before), name


def calls(context: ScoringContext) -> tuple[list[int], list[Any]]:
    """A counter for each layer, and the hooks that count."""
    counts = [0] * len(context.layers)

    def counter(index: int) -> Any:
        def count(*_: Any) -> None:
            counts[index] += 1

        return count

    # Layers answer from memory in the place of `forward`, so a hook on a part inside sees who really runs.
    hooks = []
    for index, layer in enumerate(context.layers):
        inner = next(module for module in layer.modules() if isinstance(module, nn.Linear))
        hooks.append(inner.register_forward_hook(counter(index)))
    return counts, hooks


def test_only_what_comes_before_the_unit_is_skipped(vit: Toy) -> None:
    context = context_of(vit.model(), [vit.batch()])
    context.loss(0)
    counts, _ = calls(context)
    for unit, first in {"embeddings": 0, "0": 0, "5": 5, "11": 11, "final_norm": 12, "head": 12}.items():
        counts[:] = [0] * 12
        with context.training(unit):
            context.loss(0)
        assert counts == [0] * first + [1] * (12 - first), unit


def test_two_units_together_run_from_the_first_one_on(vit: Toy) -> None:
    context = context_of(vit.model(), [vit.batch()])
    context.loss(0)
    counts, _ = calls(context)
    with context.training("head", "3"):
        context.loss(0)
    assert counts == [0] * 3 + [1] * 9


def test_an_encoder_is_skipped_while_its_decoder_trains() -> None:
    toy = TOYS["t5"]
    context = context_of(toy.model(), [toy.batch()])
    context.loss(0)
    counts, _ = calls(context)
    with context.training("decoder.1"):
        context.loss(0)
    assert counts == [0, 0, 0, 1]


def test_a_batch_that_was_never_seen_whole_is_run_whole(vit: Toy) -> None:
    context = context_of(vit.model(), [vit.batch(0), vit.batch(1)])
    context.loss(0)
    counts, _ = calls(context)
    with context.training("11"):
        context.loss(1)
    assert counts == [1] * 12


class Twice(nn.Module):
    """Calls its layers twice, as a model with shared layers does; the head reads the embedding's weight directly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in [*self.layers, *self.layers]:
            x = layer(x).tanh()
        return nn.functional.linear(x, self.out.weight).square().mean()


def test_layers_called_twice_are_not_skipped_and_weights_read_directly_skip_nothing() -> None:
    torch.manual_seed(0)
    model = Twice()
    context = context_of(model, [torch.randn(2, 4)], lambda model, batch: model(batch))
    before = context.loss(0).item()
    with context.training("head"):
        assert not context.prefix._skipped
        model.out.weight.data.mul_(2)
        assert context.loss(0).item() == pytest.approx(4 * before)
    with context.training("2"):
        assert not context.prefix._skipped
    assert context.loss(0).item() == before


def test_forward_methods_are_put_back_also_after_an_error(vit: Toy) -> None:
    model = vit.model()
    context = context_of(model, [vit.batch()])
    context.loss(0)
    own = model.vit.layers[0].forward
    model.vit.layers[1].forward = marked = lambda *args, **kwargs: own(*args, **kwargs)
    model.classifier.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), context.training("head"):
        context.loss(0)
    assert "forward" not in vars(model.vit.layers[0]) and model.vit.layers[1].forward is marked
