"""A checkpoint knows its policy, and a study its procedure, by the texts that earlier versions wrote (99d97b5)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from surgical_peft import SurgicalError, create_surgical_optimizer, policies, procedures
from surgical_peft.optim.origin import check_loaded, text_of
from surgical_peft.policies.policy import Policy

EARLIER = Path(__file__).parent / "earlier"
TEXTS: dict[str, str] = json.loads((EARLIER / "policies.json").read_text())
STUDIES: dict[str, str] = json.loads((EARLIER / "procedures.json").read_text())


def make(package: ModuleType, call: str) -> Any:
    return eval(call, dict(vars(package)))


def three_layers() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
    return model


def is_accepted(optimizer: torch.optim.Optimizer, text: str) -> bool:
    """Whether the optimizer takes a state whose groups say `text`."""
    try:
        check_loaded(optimizer, {"param_groups": [{**group, "policy": text} for group in optimizer.param_groups]})
    except SurgicalError:
        return False
    return True


@pytest.mark.parametrize("call", TEXTS)
def test_a_checkpoint_is_of_its_policy_and_no_other(call: str) -> None:
    optimizer = create_surgical_optimizer(three_layers(), torch.optim.SGD, lr=0.1)
    policy = make(policies, call) or Policy()
    optimizer.block_rates.policy = policy  # type: ignore[attr-defined]
    for other, text in TEXTS.items():
        alike = text == TEXTS[call] or str(make(policies, other)) == str(policy)
        assert is_accepted(optimizer, text) == alike, other
    assert is_accepted(optimizer, text_of(policy))


@dataclass(frozen=True)
class Outsiders(Policy):
    """A policy of the user's own, as it was written then and is now."""

    width: float = 0.5
    hard: bool = True


def test_a_checkpoint_of_the_users_own_policy() -> None:
    text = (
        "Outsiders(granularity='block', probe_batches=0, probe_every='epoch', criterion='rgn', by_epoch=False, "
        "hard=True, state_policy='keep', reset_at_probe=False, skip_idle=False, own_loss=False, width=0.5)"
    )
    optimizer = create_surgical_optimizer(three_layers(), torch.optim.SGD, lr=0.1, policy=Outsiders())
    assert is_accepted(optimizer, text)
    assert not is_accepted(optimizer, text.replace("0.5", "0.25"))
    assert not is_accepted(optimizer, text.replace("hard=True", "hard=False"))


def test_a_run_resumes_where_it_was_and_saves_todays_text() -> None:
    """Four steps under `lisa(1, every=3)`, saved; eight in all."""
    saved = torch.load(EARLIER / "lisa.pt")
    model, policy = three_layers(), policies.lisa(1, every=3)
    optimizer = create_surgical_optimizer(model, torch.optim.AdamW, lr=0.1, policy=policy)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(4, 8):
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 1.0 + step) if weight.requires_grad else None
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), saved["end"])
    assert {group["policy"] for group in optimizer.state_dict()["param_groups"]} == {text_of(policy)}


@pytest.mark.parametrize("call", STUDIES)
def test_a_study_knows_its_procedure(call: str) -> None:
    assert str(make(procedures, call)) == STUDIES[call]
