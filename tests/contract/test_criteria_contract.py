"""What every criterion must do, ours and an outsider's; a new one in `surgical_peft/criteria/` is picked up."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgical_peft import BlockMap, BlockScores, SurgicalError, criteria, score_blocks, top_k
from surgical_peft.criteria.criterion import Moments, Needs, needs_of, of_model, over_batches, over_examples
from surgical_peft.criteria.short_training.context import ScoringContext
from tests.support.toys import TOYS, Toy

Criterion = Callable[..., Any]
SHARED = {"budget", "criterion", "trial", "prefix", "short_run"}  # files of `criteria/` that are no criterion


def power(weights: Sequence[Tensor], grads: Sequence[Tensor], exponent: float = 2.0) -> float:
    return float(sum(grad.double().abs().pow(exponent).sum() for grad in grads))


@over_batches(decay=0.5, parts=2)
def agreement(weights: Sequence[Tensor], first: Moments, second: Moments) -> float:
    pairs = zip(first.means, second.means, strict=True)
    return float(sum((a.double() * b.double()).sum() for a, b in pairs))


@over_examples()
def spread(weights: Sequence[Tensor], moments: Moments) -> Tensor:
    return torch.stack([variance.double().sum() for variance in moments.variances]).sum()


@of_model(batches=2)
def sizes(trial: ScoringContext) -> dict[str, float]:
    return {name: float(sum(weight.numel() for weight in unit.values())) for name, unit in trial.units.items()}


OURS: dict[str, Criterion] = {name: getattr(criteria, name) for name in criteria.__all__}
OUTSIDERS: dict[str, Criterion] = {
    "function": power,
    "partial": partial(power, exponent=3.0),
    "over_batches": agreement,
    "over_examples": spread,
    "partial over_batches": partial(agreement),
    "of_model": sizes,
}
ALL = {**OURS, **OUTSIDERS}


@pytest.fixture(params=ALL)
def criterion(request: pytest.FixtureRequest) -> Criterion:
    return ALL[request.param]


def data(toy: Toy) -> list[dict[str, Tensor]]:
    return [toy.batch(seed) for seed in range(2)]


def unit(dtype: torch.dtype = torch.float32, nothing: bool = False) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights and four gradients of them, one after the other."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4,), ()]
    weights, *grads = ([torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(5))
    return weights, [[torch.zeros(()).to(dtype).expand(s) for s in shapes] for _ in grads] if nothing else grads


def call(criterion: Criterion, weights: list[Tensor], grads: list[list[Tensor]]) -> Any:
    """As `score_blocks` calls one that sees gradients."""
    needs = needs_of(criterion)
    if needs.what == "gradients":
        return criterion(weights, grads[0])
    moments = [Moments(weights, needs.decay) for _ in range(needs.parts)]
    for position, each in enumerate(grads):
        moments[position % needs.parts].update(each, position)
    return criterion(weights, *moments)


@pytest.fixture(params=[name for name, each in ALL.items() if needs_of(each).what != "model"])
def of_gradients(request: pytest.FixtureRequest) -> Criterion:
    return ALL[request.param]


def test_every_file_is_a_criterion_and_every_criterion_has_a_file() -> None:
    files = {path.stem for path in Path(inspect.getfile(criteria)).parent.glob("*.py")} - {"__init__"} - SHARED
    assert files == set(OURS)
    assert criteria.__all__ == sorted(set(criteria.__all__))


@pytest.mark.parametrize("name", OURS)
def test_it_documents_what_one_has_to_know(name: str) -> None:
    text = inspect.getdoc(OURS[name]) or ""
    for word in ("Range: ", "Cost: ", "Source: ", "Known ", "Example:\n    >>> "):
        assert word in text, word


def test_its_needs_are_ones_that_scoring_knows(criterion: Criterion) -> None:
    needs = needs_of(criterion)
    assert isinstance(needs, Needs)
    assert needs.what in ("gradients", "moments", "model") and needs.samples in ("batches", "examples")
    assert 0 < needs.decay <= 1 and needs.parts >= 1
    assert needs.batches >= needs.parts or needs.what == "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_gives_a_finite_number(of_gradients: Criterion, dtype: torch.dtype) -> None:
    assert math.isfinite(float(call(of_gradients, *unit(dtype))))


def test_it_changes_neither_weights_nor_gradients(of_gradients: Criterion) -> None:
    weights, grads = unit()
    value = call(of_gradients, weights, grads)
    same_weights, same_grads = unit()
    for got, expected in zip([weights, *grads], [same_weights, *same_grads], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert call(of_gradients, weights, grads) == value


def test_a_zero_gradient_gives_a_finite_number(of_gradients: Criterion) -> None:
    assert math.isfinite(float(call(of_gradients, *unit(nothing=True))))


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in ALL for family in (TOYS if name in OURS else ["bert"])]
)
def test_it_works_in_score_blocks_and_leaves_the_model_alone(name: str, family: str) -> None:
    toy, criterion = TOYS[family], ALL[name]
    model = toy.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = score_blocks(model, data(toy), criterion)
    assert isinstance(scores, BlockScores)
    assert {*scores.values, *scores.unscored} == set(BlockMap.find(model).names)
    assert all(math.isfinite(value) for value in scores.values.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert len(top_k(scores, 2).blocks) == 2


def test_it_scores_tensors(criterion: Criterion) -> None:
    model = TOYS["bert"].model()
    scores = score_blocks(model, data(TOYS["bert"]), criterion, "tensor")
    assert {*scores.values, *scores.unscored} == {name for name, _ in model.named_parameters()}
    assert scores.blocks == {name: BlockMap.find(model).block_of(name) for name in scores.values}


def test_the_same_data_give_the_same_scores(criterion: Criterion) -> None:
    toy = TOYS["bert"]
    first = score_blocks(toy.model(), data(toy), criterion)
    assert score_blocks(toy.model(), data(toy), criterion) == first
    assert score_blocks(toy.model(), data(toy), criterion, memory="low").values == pytest.approx(first.values, 1e-6)
    assert BlockScores.from_json(first.to_json()) == first


@pytest.mark.parametrize("name", OURS)
def test_by_name_and_as_a_function_it_scores_alike(name: str) -> None:
    toy = TOYS["bert"]
    by_name = score_blocks(toy.model(), data(toy), name)
    assert by_name == score_blocks(toy.model(), data(toy), OURS[name]) and by_name.criterion == name
    assert by_name.values == score_blocks(toy.model(), data(toy), f"surgical_peft.criteria:{name}").values


def test_a_bad_batch_does_not_go_unseen(criterion: Criterion, vit: Toy) -> None:
    bad = data(vit)
    bad[0]["pixel_values"][0, 0, 0, 0] = float("nan")
    if needs_of(criterion).batches == 0 or criterion is sizes:
        return
    with pytest.raises(SurgicalError, match=r"(?i)\bnan\b"):
        score_blocks(vit.model(), bad, criterion)
