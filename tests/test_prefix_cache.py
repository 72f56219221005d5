"""What a training gets instead of running its frozen start is what that would have given, and it is not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surgical_peft import BlockMap, SurgicalConfig, get_surgical_model, prefix_cache
from surgical_peft.prefix_cache import AT, PrefixCache

from .toys import Batch, Toy

COUNT, SIZE = 12, 5


def batches_of(toy: Toy) -> list[Batch]:
    """Twelve examples in batches of 5, 5 and 2."""
    whole = toy.batch(size=COUNT)
    return [{key: value[start : start + SIZE] for key, value in whole.items()} for start in range(0, COUNT, SIZE)]


def chosen(toy: Toy, at: torch.Tensor) -> Batch:
    return {key: value[at] for key, value in toy.batch(size=COUNT).items()}


def gradients(toy: Toy, blocks: Any, cache: PrefixCache | None, ran: list[str], **config: Any) -> dict[str, Any]:
    """Gradients of one step on some mixed examples, and the names of the modules that ran."""
    base = toy.model()
    originals = dict(base.named_modules())
    for name, module in originals.items():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=blocks, **config))
    at = torch.tensor([7, 0, 11, 4])
    batch = chosen(toy, at)
    if cache is None:
        wrapped(**batch).loss.backward()
    else:
        with cache.skipping(wrapped, base, originals):
            wrapped(**batch, **{AT: at}).loss.backward()
    return {name: weight.grad for name, weight in wrapped.named_parameters() if weight.grad is not None}


def test_gradients_are_those_of_the_whole_forward_pass(toy: Toy) -> None:
    model = toy.model()
    cache = PrefixCache(model, batches_of(toy))
    names = BlockMap.find(model).names
    for block in (toy.first, toy.last, names[-1]):
        plain, short = list[str](), list[str]()
        expected = gradients(toy, [block], None, plain)
        found = gradients(toy, [block], cache, short)
        assert found.keys() == expected.keys() and expected
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)
        if toy.name != "t5":  # its layers hand on position biases, which are not by example: nothing is skipped
            assert len(short) < len(plain) or block == toy.first


def test_the_frozen_start_does_not_run_and_what_is_above_does(vit: Toy) -> None:
    model = vit.model()
    cache = PrefixCache(model, batches_of(vit))
    layers = BlockMap.find(model).modules
    inside = [f"{layers['0'][0]}.attention", f"{layers['1'][0]}.attention"]
    for block, runs in (
        ("embeddings", [True, True]),
        ("0", [True, True]),
        ("1", [False, True]),
        ("head", [False] * 2),
    ):
        ran: list[str] = []
        gradients(vit, [block], cache, ran)
        # a copy in training has the hooks of its original
        assert [name in ran for name in inside] == runs, block


def test_part_of_a_block_counts_as_its_block(vit: Toy) -> None:
    cache = PrefixCache(vit.model(), batches_of(vit))
    expected = gradients(vit, ["1"], None, [], target_modules=["mlp"])
    found = gradients(vit, ["1"], cache, [], target_modules=["mlp"])
    assert found.keys() == expected.keys() and expected
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_say_its_examples_is_run_whole(vit: Toy) -> None:
    base = vit.model()
    cache = PrefixCache(base, batches_of(vit))
    originals = dict(base.named_modules())
    batch = vit.batch(seed=9, size=3)
    expected = base(**batch).logits
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=["head"]))
    with cache.skipping(wrapped, base, originals):
        wrapped(**chosen(vit, torch.tensor([1, 2])), **{AT: torch.tensor([1, 2])})
        torch.testing.assert_close(wrapped(**batch).logits, expected)
    torch.testing.assert_close(wrapped(**batch).logits, expected)


def test_an_error_on_the_way_leaves_the_model_whole(vit: Toy) -> None:
    base = vit.model()
    cache = PrefixCache(base, batches_of(vit))
    originals = dict(base.named_modules())
    expected = base(**vit.batch()).logits
    wrapped = get_surgical_model(base, SurgicalConfig(blocks=["head"]))
    with pytest.raises(IndexError), cache.skipping(wrapped, base, originals):
        wrapped(**vit.batch(), **{AT: torch.tensor([COUNT])})
    torch.testing.assert_close(wrapped(**vit.batch()).logits, expected)


class Company(nn.Module):
    """A layer whose output depends on the other examples of the batch."""

    def __init__(self, inner: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.change(self.inner(*args, **kwargs))


@pytest.mark.parametrize("change", [lambda x: x - x.mean(0, keepdim=True), lambda x: x + len(x)], ids=["mean", "size"])
def test_a_layer_that_looks_at_the_whole_batch_is_left_out(vit: Toy, change: Callable[..., torch.Tensor]) -> None:
    model = vit.model()
    name = BlockMap.find(model).modules["0"][0]
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)[int(last)] = Company(model.get_submodule(name), change)  # type: ignore[operator]
    cache = PrefixCache(model, batches_of(vit))
    assert BlockMap.find(model).modules["embeddings"][0] in cache.known
    assert name not in cache.known


def test_room_is_a_limit(vit: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = vit.model(), vit.batch(size=2)
    assert PrefixCache.fits(model, batch, 1000)
    sizes = [tensor.nbytes for tensor in _outputs(model, batch)]
    monkeypatch.setattr(prefix_cache, "ROOM", sum(sizes) // 2 * 1000)
    assert PrefixCache.fits(model, batch, 1000)
    assert not PrefixCache.fits(model, batch, 1001)


def _outputs(model: nn.Module, batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for names in BlockMap.find(model).modules.values():
        for name in names:
            module = dict(model.named_modules()).get(name)
            if module is not None:
                module.register_forward_hook(lambda *each: found.append(each[2]))
    model(**batch)
    return found
