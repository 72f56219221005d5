"""`score_blocks`: equal to a plain loop, streaming, and the model untouched whatever happens."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from surgical_peft import BlockMap, SurgicalConfig, SurgicalError, criteria, score_blocks
from surgical_peft.criteria.criterion import Moments, of_model, over_examples
from tests.support.toys import TOYS, Batch, Toy


def batches(toy: Toy, count: int = 3) -> list[Batch]:
    return [toy.batch(seed, size=2 + seed) for seed in range(count)]  # of different sizes, so that the mean matters


def plain_rgn(model: nn.Module, data: list[Batch], unit_of: Callable[[str], str]) -> dict[str, float]:
    """The reference: one `autograd.grad` a batch, norms in float64, the mean of the ratios."""
    names, weights = zip(*((n, p) for n, p in model.named_parameters()), strict=True)
    ratios: dict[str, list[float]] = {}
    for batch in data:
        grads = torch.autograd.grad(model(**batch).loss, weights, allow_unused=True)
        pulls, sizes = {}, {}
        for name, weight, grad in zip(names, weights, grads, strict=True):
            unit = unit_of(name)
            sizes[unit] = sizes.get(unit, 0.0) + weight.detach().double().square().sum().item()
            pulls[unit] = pulls.get(unit, 0.0) + (0.0 if grad is None else grad.double().square().sum().item())
        for unit in sizes:
            ratios.setdefault(unit, []).append(math.sqrt(pulls[unit] / sizes[unit]))
    return {unit: sum(values) / len(values) for unit, values in ratios.items()}


@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
@pytest.mark.parametrize("name", TOYS)
def test_rgn_equals_a_plain_loop(name: str, granularity: str) -> None:
    toy = TOYS[name]
    model = toy.model()
    blocks = BlockMap.find(model)
    unit_of = {"block": blocks.block_of, "module": lambda n: n.rpartition(".")[0], "tensor": lambda n: n}[granularity]
    expected = plain_rgn(model, batches(toy), unit_of)
    scores = score_blocks(model, batches(toy), granularity=granularity)
    assert scores.values == pytest.approx(expected, rel=1e-6, abs=0)
    assert (scores.num_batches, scores.unscored) == (3, ())
    assert scores.blocks == {unit: unit if granularity == "block" else blocks.block_of(unit) for unit in expected}
    assert sum(scores.sizes.values()) == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_are_scored_in_the_order_of_the_model(toy: Toy) -> None:
    assert tuple(score_blocks(toy.model(), batches(toy, 1)).values) == toy.blocks


def test_scores_do_not_depend_on_what_is_frozen_or_trained(vit: Toy) -> None:
    model = vit.model()
    expected = score_blocks(model, batches(vit))
    model.train().requires_grad_(False)
    assert score_blocks(model, batches(vit)) == expected


def test_dropout_is_off_while_scoring() -> None:
    toy = TOYS["bert"]  # its configuration has a dropout of 0.1
    assert score_blocks(toy.model().train(), batches(toy)) == score_blocks(toy.model().eval(), batches(toy))


class Experts(nn.Module):
    """Layers of two experts each, of which a batch uses one; a last weight that nothing uses."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(layers))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        for layer in self.layers:
            x = x + layer[expert](x)
        return x.square().mean()


def expert_loss(model: nn.Module, batch: tuple[Tensor, int]) -> Tensor:
    return model(*batch)


def test_weights_without_a_gradient_count_as_a_zero_one_and_units_of_no_others_have_no_score() -> None:
    torch.manual_seed(0)
    model, x = Experts(), torch.randn(3, 8)
    found = score_blocks(model, [(x, 0), (x, 1)], loss_fn=expert_loss)
    assert found.unscored == ("head",)
    scores = found.values
    loss = model(x, 0)
    size = torch.cat([p.flatten() for p in model.layers[1].parameters()]).norm()
    first = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.layers[1][0].parameters()))]).norm()
    loss = model(x, 1)
    second = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.layers[1][1].parameters()))]).norm()
    assert scores["1"] == pytest.approx(((first + second) / 2 / size).item(), rel=1e-6)


class Snapshot:
    """Everything that scoring must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        self.requires_grad = [p.requires_grad for p in model.parameters()]
        self.grads = [p.grad for p in model.parameters()]
        self.grad_values = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.modes = [module.training for module in model.modules()]
        self.hooks = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
        self.rng = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())

    def assert_unchanged(self) -> None:
        model = self.model
        now = dict(model.named_parameters())
        assert now.keys() == self.parameters.keys()
        for name, (parameter, value) in self.parameters.items():
            assert now[name] is parameter and torch.equal(parameter, value), name
        assert all(torch.equal(b, self.buffers[name]) for name, b in model.named_buffers())
        assert [p.requires_grad for p in model.parameters()] == self.requires_grad
        for parameter, grad, value in zip(model.parameters(), self.grads, self.grad_values, strict=True):
            assert parameter.grad is grad and (grad is None or torch.equal(grad, value))
        assert [module.training for module in model.modules()] == self.modes
        assert [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()] == self.hooks
        assert torch.equal(torch.get_rng_state(), self.rng[0])
        assert np.random.get_state()[1].tolist() == self.rng[1] and random.getstate() == self.rng[2]
        assert torch.is_grad_enabled()


def mixed_state(model: nn.Module) -> nn.Module:
    """Some weights frozen, some with gradients, some modules in train mode: a model in the middle of its life."""
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 3 == 1:
            parameter.grad = torch.full_like(parameter, index)
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    return model


def noisy(data: list[Batch]) -> Iterator[Batch]:
    """Draws from every random generator, as augmentation does."""
    for batch in data:
        torch.rand(1), np.random.rand(), random.random()
        yield batch


def test_the_model_and_the_random_states_are_untouched(toy: Toy) -> None:
    model = mixed_state(toy.model())
    before = Snapshot(model)
    score_blocks(model, noisy(batches(toy)))
    before.assert_unchanged()


def broken_loader(toy: Toy) -> Iterator[Batch]:
    yield from noisy(batches(toy, 2))
    raise OSError("disk gone")


def nan_loader(toy: Toy) -> Iterator[Batch]:
    yield from noisy(batches(toy, 1))
    batch = toy.batch(1)
    yield {**batch, "pixel_values": batch["pixel_values"] * float("nan")}


@pytest.mark.parametrize(("loader", "error"), [(broken_loader, OSError), (nan_loader, SurgicalError)])
def test_the_model_is_untouched_after_an_error(
    loader: Callable[[Toy], Iterator[Batch]], error: type[Exception], vit: Toy
) -> None:
    model = mixed_state(vit.model())
    before = Snapshot(model)
    with pytest.raises(error):
        score_blocks(model, loader(vit))
    before.assert_unchanged()


def test_the_model_is_untouched_when_the_criterion_raises(vit: Toy) -> None:
    def faulty(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
        raise ZeroDivisionError

    model = mixed_state(vit.model())
    before = Snapshot(model)
    with pytest.raises(ZeroDivisionError):
        score_blocks(model, batches(vit), faulty)
    before.assert_unchanged()


def test_scoring_works_under_no_grad(vit: Toy) -> None:
    with torch.no_grad():
        scores = score_blocks(vit.model(), batches(vit))
        assert not torch.is_grad_enabled()
    assert scores == score_blocks(vit.model(), batches(vit))


def peak_gradient_bytes(model: nn.Module, **kwargs: Any) -> int:
    """Most bytes of gradients alive at once, seen from hooks that run as each gradient arrives."""
    peak = 0

    def look(_: Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    score_blocks(model, **kwargs)
    return peak


def block_bytes(model: nn.Module) -> list[int]:
    return [sum(p.nbytes for p in group) for group in BlockMap.find(model).parameters(model).values()]


@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
def test_peak_memory_is_the_gradients_of_one_block(granularity: str, toy: Toy) -> None:
    model = toy.model()
    peak = peak_gradient_bytes(model, dataloader=batches(toy, 2), granularity=granularity)
    assert 0 < peak <= 1.05 * max(block_bytes(model))
    assert peak < 0.6 * sum(block_bytes(model))  # far from a second copy of the model


def test_peak_memory_with_unused_experts() -> None:
    """A block with an expert without a token was waited for to the end: the gradients of all blocks lived at once."""
    model = Experts(layers=6)
    peak = peak_gradient_bytes(model, dataloader=[(torch.randn(3, 8), 0)], loss_fn=expert_loss)
    assert peak <= 1.05 * max(block_bytes(model))


def test_gradients_of_zero_blocks_are_not_kept() -> None:
    """Nobody read the gradient of a unit left out of the scores, and so it stayed, and grew, to the end."""
    model = Experts(layers=6)
    for parameter in model.layers[:4].parameters():
        nn.init.zeros_(parameter)
    peak = peak_gradient_bytes(model, dataloader=[(torch.randn(3, 8), 0)] * 2, loss_fn=expert_loss)
    assert peak <= 1.05 * max(block_bytes(model))


def test_gradients_are_freed_and_not_just_moved(vit: Toy) -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def watching(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
        counts.append(sum(each() is not None for each in alive))
        alive.extend(weakref.ref(grad) for grad in grads)
        return criteria.rgn(weights, grads)

    score_blocks(vit.model(), batches(vit, 2), watching)
    assert max(counts) == 0


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "nan|inf")])
def test_a_gradient_that_is_not_finite_names_the_block_and_the_batch(value: float, shown: str, vit: Toy) -> None:
    data = batches(vit)
    data[2]["pixel_values"][0, 0, 0, 0] = value
    with pytest.raises(SurgicalError, match=f"'head' in batch 2.*({shown})"):
        score_blocks(vit.model(), data)


def test_a_broken_block_is_named(vit: Toy) -> None:
    model = vit.model()
    model.vit.layers[7].register_full_backward_hook(
        lambda module, pulled, pushed: (pulled[0] * float("inf"), *pulled[1:])
    )
    with pytest.raises(SurgicalError, match="'6' in batch 0"):
        score_blocks(model, batches(vit))


def test_fewer_batches_than_asked_for_are_recorded(vit: Toy) -> None:
    assert score_blocks(vit.model(), batches(vit, 2), num_batches=5).num_batches == 2
    assert score_blocks(vit.model(), batches(vit, 5), num_batches=2).num_batches == 2


def test_no_more_batches_are_drawn_than_asked_for(vit: Toy) -> None:
    loader = iter(batches(vit, 3))
    score_blocks(vit.model(), loader, num_batches=2)
    assert len(list(loader)) == 1


def test_a_loss_function_takes_any_batch(vit: Toy) -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(pixel_values=batch[0]).logits, batch[1])

    pairs = [(batch["pixel_values"], batch["labels"]) for batch in batches(vit)]
    by_function = score_blocks(vit.model(), pairs, loss_fn=loss_fn)
    assert by_function.values == pytest.approx(score_blocks(vit.model(), batches(vit)).values, rel=1e-6)


def test_a_torch_loader_works_and_leaves_the_random_state(vit: Toy) -> None:
    whole = vit.batch(size=12)
    rows = [{key: value[i] for key, value in whole.items()} for i in range(12)]
    loader = DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    assert score_blocks(vit.model(), loader).num_batches == 3
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"dataloader": []}, "empty"),
        ({"dataloader": [(1, 2)]}, "tuple"),
        ({"num_batches": 0}, "num_batches=0"),
        ({"num_batches": 0, "criterion": "fisher"}, "num_batches=0"),
        ({"dataloader": None}, "empty"),
        ({"criterion": 3}, "criterion=3.*int"),
        ({"criterion": "fischer"}, "'fischer'.*'fisher'.*weight_snr"),
        ({"memory": "lo"}, "memory='lo'.*'low'"),
        ({"criterion": "fisher", "dataloader": [{"labels": torch.tensor(1)}]}, "without a tensor"),
        ({"criterion": "snr", "dataloader": [{"labels": torch.zeros(0)}]}, "no examples"),
        ({"criterion": "held_out_gain", "num_batches": 1}, "2 parts"),
        ({"num_batches": -1}, "num_batches=-1"),
        ({"granularity": "blocks"}, "'blocks'.*'block'.*block, module, tensor"),
        ({"criterion": "rnn"}, "'rnn'.*'rgn'"),
        ({"criterion": "surgical_peft:rgn_"}, "cannot be imported"),
        ({"criterion": "math:pi"}, "'math:pi' is a float"),
    ],
)
def test_bad_input_is_refused(kwargs: dict[str, Any], why: str, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match=why):
        score_blocks(vit.model(), **{"dataloader": batches(vit), **kwargs})


@pytest.mark.parametrize("name", list(TOYS))
def test_a_batch_without_labels_is_refused(name: str) -> None:
    data = [{key: value for key, value in TOYS[name].batch().items() if key != "labels"}]
    with pytest.raises(SurgicalError, match="'labels'"):
        score_blocks(TOYS[name].model(), data)


def gradient_norm(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    return math.sqrt(sum(grad.square().sum().item() for grad in grads))


class Scaled:
    def __call__(self, weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
        return 2 * criteria.rgn(weights, grads)


def test_the_users_own_criterion(vit: Toy) -> None:
    given = score_blocks(vit.model(), batches(vit), gradient_norm)
    named = score_blocks(vit.model(), batches(vit), f"{__name__}:gradient_norm")
    assert given == named and given.criterion == f"{__name__}:gradient_norm"


def test_a_callable_object_is_a_criterion(vit: Toy) -> None:
    """Only functions have a `__qualname__`; an object or a `partial` ended in an AttributeError after all the work."""
    scores = score_blocks(vit.model(), batches(vit), Scaled())
    assert scores.criterion == f"{__name__}:Scaled"
    expected = score_blocks(vit.model(), batches(vit)).values
    assert scores.values == pytest.approx({name: 2 * value for name, value in expected.items()})


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_a_peft_model_is_scored_by_its_tuned_copies(granularity: str, vit: Toy) -> None:
    expected = score_blocks(vit.model(), batches(vit), granularity=granularity)
    model = peft.get_peft_model(vit.model(), SurgicalConfig(blocks=[0, -1]))
    fresh = score_blocks(model, batches(vit), granularity=granularity)
    assert (fresh.values, fresh.sizes) == (expected.values, expected.sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".layers.11." in name:
                parameter.mul_(3)
    tuned = score_blocks(model, batches(vit), granularity=granularity)
    merged = score_blocks(model.merge_and_unload(), batches(vit), granularity=granularity)
    assert tuned.values == merged.values != expected.values


def test_a_new_head_under_peft_is_scored(vit: Toy) -> None:
    config = SurgicalConfig(blocks=[0], modules_to_save=["classifier"])
    model = peft.get_peft_model(vit.model(), config)
    assert score_blocks(model, batches(vit)).values == score_blocks(vit.model(), batches(vit)).values


def test_units_of_zeros_are_left_out(vit: Toy) -> None:
    model = vit.model()
    nn.init.zeros_(model.classifier.bias)
    nn.init.zeros_(model.vit.layers[3].attention.q_proj.weight)
    tensors = score_blocks(model, batches(vit), granularity="tensor")
    assert set(tensors.unscored) == {"classifier.bias", "vit.layers.3.attention.q_proj.weight"}
    assert not set(tensors.unscored) & (set(tensors.values) | set(tensors.sizes) | set(tensors.blocks))
    assert score_blocks(model, batches(vit)).unscored == ()
    nn.init.zeros_(model.vit.layernorm.weight)
    nn.init.zeros_(model.vit.layernorm.bias)
    model.vit.layernorm.register_forward_hook(lambda module, args, output: output + args[0])
    assert score_blocks(model, batches(vit)).unscored == ("final_norm",)


def training_loss(model: nn.Module, batch: Batch) -> Tensor:
    model.train()  # transformers checkpoints in train mode only
    return model(**batch).loss


def test_gradient_checkpointing_changes_nothing(vit: Toy) -> None:
    plain = score_blocks(vit.model(), batches(vit), loss_fn=training_loss)
    model = vit.model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    model.vit.layers[5].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = score_blocks(model, batches(vit), loss_fn=training_loss)
    assert len(calls) == 2 * 3  # every forward pass was run again
    assert checkpointed.values == pytest.approx(plain.values, rel=1e-6)
    assert score_blocks(model, batches(vit)).values == pytest.approx(plain.values, rel=1e-6)


class Reentrant(nn.Module):
    """Checkpoints as torch did it first: the parameters inside are not in the graph; `part` leaves half of it out."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part = part
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.part:
                x = layer[1](checkpoint(layer[0], x, use_reentrant=True))
            else:
                x = checkpoint(layer, x, use_reentrant=True)
        return x.square().mean()


def test_reentrant_checkpointing_is_right_or_refused() -> None:
    torch.manual_seed(0)
    model, x = Reentrant(part=False), torch.randn(3, 4, requires_grad=True)
    grads = torch.autograd.grad(
        model.layers[2](model.layers[1](model.layers[0](x))).square().mean(), model.parameters()
    )
    scores = score_blocks(model, [x], loss_fn=lambda model, batch: model(batch))
    assert scores.values["1"] == pytest.approx(criteria.rgn(list(model.layers[1].parameters()), grads[4:8]), rel=1e-6)
    with pytest.raises(SurgicalError, match="use_reentrant=False"):
        score_blocks(Reentrant(part=True), [x], loss_fn=lambda model, batch: model(batch))


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_bfloat16(name: str) -> None:
    toy = TOYS[name]
    model = toy.model().bfloat16()
    data = [{k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches(toy)]
    scores = score_blocks(model, data)
    assert scores.values == pytest.approx(score_blocks(toy.model(), batches(toy)).values, rel=0.1)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_container_changes_no_score(wrap: Callable[[nn.Module], nn.Module]) -> None:
    toy = TOYS["bert"]
    scores = score_blocks(wrap(toy.model()), batches(toy, 1), granularity="tensor")
    expected = score_blocks(toy.model(), batches(toy, 1), granularity="tensor")
    assert scores.values == pytest.approx(expected.values, rel=1e-5)
    assert list(scores.values) == list(expected.values)


@pytest.mark.parametrize(
    "value", [None, "high", torch.ones(2), True, [1.0], 1j], ids=lambda value: type(value).__name__
)
def test_a_criterion_that_returns_no_number_is_refused(value: Any, vit: Toy) -> None:
    model = mixed_state(vit.model())
    before = Snapshot(model)
    with pytest.raises(SurgicalError, match=r"'head', a \w+: .*one number"):
        score_blocks(model, batches(vit), lambda weights, grads: value)
    before.assert_unchanged()


@pytest.mark.parametrize("value", [torch.tensor(0.5), torch.tensor([0.5]), np.float32(0.5), np.float64(0.5), 0.5])
def test_numbers_of_any_kind_are_taken(value: Any, vit: Toy) -> None:
    assert set(score_blocks(vit.model(), batches(vit), lambda weights, grads: value).values.values()) == {0.5}
    assert set(score_blocks(vit.model(), batches(vit), lambda weights, grads: 2).values.values()) == {2.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_criterion_that_returns_nan_is_refused(value: float, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match="'head' in batch 0"):
        score_blocks(vit.model(), batches(vit), lambda weights, grads: value)


@pytest.mark.parametrize(("found", "why"), [(3.0, "a float"), ({"nowhere": 1.0}, "the units nowhere")])
def test_a_criterion_of_the_model_must_return_its_units(found: Any, why: str, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match=f"{why}: .*{{unit: score}}"):
        score_blocks(vit.model(), batches(vit), of_model(batches=1)(lambda trial: found))


@pytest.mark.parametrize("name", ["bvr", "fisher"])
def test_a_bad_example_is_named(name: str, vit: Toy) -> None:
    data = batches(vit)  # of 2, 3 and 4 examples
    data[1]["pixel_values"][2, 0, 0, 0] = float("nan")
    where = {"bvr": "batch 1", "fisher": "example 4"}[name]
    with pytest.raises(SurgicalError, match=f"'head' in {where} "):
        score_blocks(vit.model(), data, name)


@pytest.mark.parametrize(("toy_name", "wrong", "known"), [("vit", 7, 3), ("bert", -1, 3), ("llama", 99, 24)])
def test_labels_out_of_range_are_named(toy_name: str, wrong: int, known: int) -> None:
    """torch says `IndexError: Target 7 is out of bounds.` on the CPU, and on a GPU that an assertion failed."""
    toy = TOYS[toy_name]
    batch = toy.batch()
    batch["labels"].view(-1)[-1] = wrong
    with pytest.raises(SurgicalError, match=f"labels.*{wrong}; .*0 to {known - 1}"):
        score_blocks(toy.model(), [batch])


@pytest.mark.parametrize("name", ["rgn", "fisher"])
def test_labels_to_ignore_are_in_range(name: str) -> None:
    toy = TOYS["llama"]
    batch = toy.batch()
    batch["labels"][:, :3] = -100
    assert min(score_blocks(toy.model(), [batch], name).values.values()) > 0


def test_another_error_of_the_model_is_left_alone() -> None:
    batch = TOYS["bert"].batch()
    batch["input_ids"][0, 0] = 99
    with pytest.raises(IndexError, match="index out of range in self"):
        score_blocks(TOYS["bert"].model(), [batch])


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
        for layer in self.layers:
            layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)


def test_a_model_of_integers_is_refused() -> None:
    with pytest.raises(SurgicalError, match=r"Integers.*floating-point"):
        score_blocks(Integers(), [{"x": torch.ones(1)}])


def entropy(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return torch.distributions.Categorical(logits=logits).entropy().mean()


@pytest.mark.parametrize("name", criteria.__all__)
def test_entropy_scores_unlabeled_data(name: str) -> None:
    toy = TOYS["bert"]
    data = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches(toy, 4)]
    scores = score_blocks(toy.model(), data, name, loss_fn=entropy)
    assert scores == score_blocks(toy.model(), batches(toy, 4), name, loss_fn=entropy)
    assert len(scores.values) >= 3 and all(math.isfinite(value) for value in scores.values.values())


def test_entropy_equals_a_plain_loop() -> None:
    toy = TOYS["bert"]
    model, batch = toy.model(), toy.batch()
    logits = model(input_ids=batch["input_ids"]).logits
    loss = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    weights = list(model.classifier.parameters())
    size = math.hypot(*(weight.norm().item() for weight in weights))
    expected = math.hypot(*(grad.norm().item() for grad in torch.autograd.grad(loss, weights))) / size
    scores = score_blocks(model, [batch], granularity="module", loss_fn=entropy)
    assert scores.values["classifier"] == pytest.approx(expected, rel=1e-5)


def moments_alive(but: set[int]) -> int:
    alive = [each for each in gc.get_objects() if type(each) is Moments and id(each) not in but]
    return sum(tensor.nbytes for each in alive for tensor in (*each.means, *each.spreads))


@pytest.mark.parametrize("granularity", ["block", "module", "tensor"])
def test_low_memory_scores_alike_and_keeps_moments_of_one_group(granularity: str) -> None:
    toy, most = TOYS["bert"], {"normal": 0, "low": 0}
    others = {id(each) for each in gc.get_objects() if type(each) is Moments}  # of tests that failed on purpose
    for memory in most:

        @over_examples()
        def watching(weights: Sequence[Tensor], moments: Moments, memory: str = memory) -> float:
            most[memory] = max(most[memory], moments_alive(others))
            return criteria.fisher(weights, moments)

        scores = score_blocks(toy.model(), batches(toy), watching, granularity, memory=memory)
        expected = score_blocks(toy.model(), batches(toy), "fisher", granularity)
        assert scores.values == pytest.approx(expected.values, rel=1e-6)
    assert most["low"] <= 2 * 4 * max(expected.sizes.values())  # two float32 numbers for each weight
    assert most["normal"] == 2 * 4 * sum(expected.sizes.values())


def test_low_memory_keeps_gradients_of_one_group() -> None:
    """Weights of other groups need no gradient, so that none is computed."""
    toy, seen = TOYS["bert"], []

    def watching(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
        seen.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
        return 1.0

    model = toy.model()
    scores = score_blocks(model, batches(toy), watching, memory="low")
    assert max(seen) <= max(scores.sizes.values())


def test_low_memory_leaves_the_model_as_it_was(vit: Toy) -> None:
    model = mixed_state(vit.model())
    before = Snapshot(model)
    score_blocks(model, noisy(batches(vit)), "snr", memory="low")
    before.assert_unchanged()


@pytest.mark.parametrize("name", criteria.__all__)
def test_every_criterion_leaves_the_model_and_the_random_states(name: str, vit: Toy) -> None:
    model = mixed_state(vit.model())
    before = Snapshot(model)
    score_blocks(model, noisy(batches(vit)), name)
    before.assert_unchanged()


@pytest.mark.parametrize("name", criteria.__all__)
def test_dropout_is_off_for_every_criterion(name: str) -> None:
    toy = TOYS["bert"]
    assert score_blocks(toy.model().train(), batches(toy), name) == score_blocks(toy.model(), batches(toy), name)


def test_examples_of_a_tuple_are_its_rows(vit: Toy) -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, str]) -> Tensor:
        return nn.functional.cross_entropy(model(pixel_values=batch[0]).logits, batch[1])

    triples = [(batch["pixel_values"], batch["labels"], "note") for batch in batches(vit)]
    expected = score_blocks(vit.model(), batches(vit), "fisher").values
    assert score_blocks(vit.model(), triples, "fisher", loss_fn=loss_fn).values == pytest.approx(expected, rel=1e-5)
