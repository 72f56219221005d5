"""The numbers of each criterion, and of the norms that they share with the policies."""

from __future__ import annotations

import math

import pytest
import torch

from surgical_peft.criteria import rgn
from surgical_peft.criteria.rgn import norm, relative_gradient_norms

from .toys import Toy


def test_rgn_by_hand() -> None:
    assert rgn([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 1.0])]) == pytest.approx(0.2)


def test_rgn_is_of_the_concatenation_and_not_a_mean_over_tensors() -> None:
    weights = [torch.tensor([[3.0], [0.0]]), torch.tensor([4.0])]
    grads = [torch.tensor([[6.0], [0.0]]), torch.tensor([8.0])]
    assert rgn(weights, grads) == pytest.approx(2.0)
    assert rgn(weights, [grads[0], torch.zeros(1)]) == pytest.approx(6 / 5)  # the mean of ratios would be 1


def test_rgn_of_a_zero_gradient_is_zero() -> None:
    assert rgn([torch.ones(3)], [torch.zeros(()).expand(3)]) == 0


def test_norms_of_large_tensors_are_exact() -> None:
    """The float32 norm of one large tensor is wrong on the CPU: by 4e-5 at this size, by 1.4e-3 at 25 million."""
    tensor = torch.randn(1500, 2000, generator=torch.Generator().manual_seed(0)).mul_(0.02).add_(0.01)
    expected = torch.linalg.vector_norm(tensor.double()).item()
    assert norm([tensor]) == pytest.approx(expected, rel=1e-6)
    assert norm([tensor[:750], tensor[750:].reshape(3, -1)]) == pytest.approx(expected, rel=1e-6)


def test_norms_of_low_precision_are_summed_in_float32() -> None:
    tensor = torch.full((100_000,), 0.01, dtype=torch.bfloat16)
    assert norm([tensor]) == pytest.approx(tensor.double().norm().item(), rel=1e-6)
    assert norm([torch.full((100_000,), 300.0, dtype=torch.float16)]) == pytest.approx(300 * math.sqrt(1e5), rel=1e-6)


def test_norms_of_double_precision_stay_double() -> None:
    tensor = torch.randn(1000, dtype=torch.float64)
    assert norm([tensor]) == pytest.approx(tensor.norm().item(), rel=1e-14)


@pytest.mark.parametrize("tensor", [torch.tensor(-2.0), torch.full((4, 1), 1.0).expand(4, 1), torch.ones(2, 2).t()])
def test_norms_of_odd_shapes(tensor: torch.Tensor) -> None:
    assert norm([tensor]) == pytest.approx(2.0)


def test_relative_gradient_norms_are_rgn_of_each_unit(toy: Toy) -> None:
    model = toy.model()
    model(**toy.batch()).loss.backward()
    units = [list(module.parameters()) for module in model.modules() if list(module.parameters())]
    for got, unit in zip(relative_gradient_norms(units), units, strict=True):
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in unit]
        assert got == pytest.approx(rgn(unit, grads), rel=1e-6)
