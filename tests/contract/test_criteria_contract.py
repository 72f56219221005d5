"""What every criterion must do. A new one in `surgical_peft/criteria/` is picked up by itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from surgical_peft import BlockMap, BlockScores, criteria, score_blocks, top_k

from ..toys import Toy

Criterion = Callable[[Sequence[Tensor], Sequence[Tensor]], float]
found: dict[str, Criterion] = {name: getattr(criteria, name) for name in criteria.__all__}


@pytest.fixture(params=sorted(found))
def criterion(request: pytest.FixtureRequest) -> Criterion:
    return found[request.param]


def unit(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (4,), ()]
    weights, grads = ([torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(2))
    return weights, grads


def test_every_file_is_a_criterion_and_every_criterion_has_a_file() -> None:
    assert len(found) >= 1
    folder = Path(inspect.getfile(criteria)).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == set(found)
    assert criteria.__all__ == sorted(set(criteria.__all__))


def test_it_takes_weights_and_gradients(criterion: Criterion) -> None:
    assert list(inspect.signature(criterion).parameters)[:2] == ["weights", "grads"]


def test_it_documents_its_source_and_shows_an_example(criterion: Criterion) -> None:
    text = inspect.getdoc(criterion) or ""
    assert "Source: " in text and "Example:\n    >>> " in text
    assert "Range: " in text and "Cost: " in text


def test_it_gives_a_finite_float(criterion: Criterion) -> None:
    value = criterion(*unit())
    assert isinstance(value, float) and math.isfinite(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_gives_a_finite_float_in_other_precisions(criterion: Criterion, dtype: torch.dtype) -> None:
    value = criterion(*unit(dtype=dtype))
    assert isinstance(value, float) and math.isfinite(value)


def test_the_same_input_gives_the_same_value(criterion: Criterion) -> None:
    assert criterion(*unit()) == criterion(*unit())


def test_it_changes_neither_weights_nor_gradients(criterion: Criterion) -> None:
    weights, grads = unit()
    criterion(weights, grads)
    for got, expected in zip([*weights, *grads], [tensor for part in unit() for tensor in part], strict=True):
        assert torch.equal(got, expected)


def test_a_zero_gradient_gives_a_finite_float(criterion: Criterion) -> None:
    weights, _ = unit()
    assert math.isfinite(criterion(weights, [torch.zeros(()).expand(weight.shape) for weight in weights]))


def test_a_gradient_that_is_not_finite_does_not_go_unseen(criterion: Criterion) -> None:
    weights, grads = unit()
    grads[0][0, 0] = float("nan")
    assert not math.isfinite(criterion(weights, grads))


def test_it_works_in_score_blocks_and_leaves_the_model_alone(criterion: Criterion, toy: Toy) -> None:
    model = toy.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = score_blocks(model, [toy.batch(0), toy.batch(1)], criterion=criterion.__name__)
    assert isinstance(scores, BlockScores) and scores.criterion == criterion.__name__
    assert (*scores.values, *scores.unscored) == BlockMap.find(model).names
    assert all(math.isfinite(value) for value in scores.values.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert len(top_k(scores, 2).blocks) == 2


def test_by_name_and_as_a_function_it_scores_alike(criterion: Criterion, vit: Toy) -> None:
    by_name = score_blocks(vit.model(), [vit.batch()], criterion=criterion.__name__)
    as_function = score_blocks(vit.model(), [vit.batch()], criterion=criterion)
    assert by_name.values == as_function.values
