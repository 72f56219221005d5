"""What every policy must show; a new file in `policies/` is picked up by itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from surgical_peft import SurgicalConfig, create_surgical_optimizer, policies
from surgical_peft.policies.policy import Policy, Unit

from ..toys import Toy


@dataclass(frozen=True)
class LoudestOnly(Policy):
    """A user's own: the unit with the largest gradient at the full rate, the others at `rest`."""

    rest: float = 0.25

    def step_multipliers(self, units: Sequence[Unit]) -> dict[str, float] | None:
        sizes = {unit.name: sum(float(p.grad.norm()) for p in unit.parameters if p.grad is not None) for unit in units}
        return {name: 1.0 if size == max(sizes.values()) else self.rest for name, size in sizes.items()}


MAKERS: dict[str, Callable[[], Policy]] = {
    **{name: getattr(policies, name) for name in policies.__all__},
    "LoudestOnly": LoudestOnly,
}
every_policy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def start(toy: Toy, make: Callable[[], Policy]) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[toy.first, toy.last])).train()
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.1, policy=make())
    return model, optimizer


def train(model: PeftModel, optimizer: torch.optim.Optimizer, toy: Toy, steps: range) -> list[list[float]]:
    """Trains, and gives the factors of each step."""
    factors = []
    for step in steps:
        torch.manual_seed(step)  # dropout
        model.zero_grad()
        model(**toy.batch(step)).loss.backward()
        optimizer.step()
        factors.append([group["lr_multiplier"] for group in optimizer.param_groups])
    return factors


def through_a_file(value: object) -> dict:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_file_is_a_policy_and_every_policy_a_file() -> None:
    files = {path.stem for path in Path(policies.__file__).parent.glob("*.py")} - {"__init__", "policy"}
    assert files == set(policies.__all__)
    assert len(files) == 3


@every_policy
def test_five_steps_move_what_is_trained_and_nothing_else(make: Callable[[], Policy], toy: Toy) -> None:
    model, optimizer = start(toy, make)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = [group["lr"] for group in optimizer.param_groups]
    for factors in train(model, optimizer, toy, range(5)):
        assert all(0 <= factor < float("inf") for factor in factors)
        assert max(factors) > 0
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(rate > 0 for rate in rates)
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all()
        assert p.requires_grad or torch.equal(p, before[name])
    moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for group in optimizer.param_groups:
        assert moved & {id(p) for p in group["params"]}, group["unit"]


@every_policy
def test_state_through_a_file_continues_bitwise(make: Callable[[], Policy], toy: Toy) -> None:
    model, optimizer = start(toy, make)
    train(model, optimizer, toy, range(3))
    weights, state = through_a_file((model.state_dict(), optimizer.state_dict()))
    factors = train(model, optimizer, toy, range(3, 5))

    other, resumed = start(toy, make)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert train(other, resumed, toy, range(3, 5)) == factors
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    assert all(torch.equal(p, q) for (_, p), (_, q) in pairs)


@every_policy
def test_two_of_the_same_settings_are_one_policy(make: Callable[[], Policy]) -> None:
    """A checkpoint knows its policy by this text, so it must not hold addresses."""
    assert make() == make()
    assert str(make()) == str(make())
    assert " at 0x" not in str(make())


@pytest.mark.parametrize("name", policies.__all__)
def test_docstring_has_source_and_example(name: str) -> None:
    text = getattr(policies, name).__doc__
    assert "Source: " in text or text.startswith("Constant")
    assert "Example:\n        >>> " in text
