"""Adapters, checkpoints and studies of earlier versions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from surgical_peft import SurgicalConfig, SurgicalError, create_surgical_optimizer, policies, procedures
from surgical_peft.optim.origin import check_loaded, text_of
from surgical_peft.policies.policy import Policy
from tests.support.toys import TOYS

EARLIER = Path(__file__).parent / "earlier"
# ---- adapters of 37b8b3a, which wrapped a copy of each module

ADAPTERS = {"two": "llama", "cls": "bert", "parts": "bert"}  # LoRA beside blocks; a new head; biases only


def natively(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(folder)  # type: ignore[operator]
    return base


DOORS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "peft": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "transformers": natively,
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("door", DOORS)
def test_they_load_and_are_saved_again_as_they_were(name: str, door: str, tmp_path: Path) -> None:
    toy = TOYS[ADAPTERS[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = DOORS[door](toy.model(), EARLIER / name).eval()
    assert all(type(config) is SurgicalConfig for config in model.peft_config.values())
    expected = load_file(EARLIER / "logits.safetensors")[name]
    with torch.no_grad():
        torch.testing.assert_close(model(**toy.batch()).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    before, after = (load_file(each / "adapter_model.safetensors") for each in (EARLIER / name, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_second_one_loads_beside_it() -> None:
    model = PeftModel.from_pretrained(TOYS["llama"].model(), EARLIER / "two")
    model.load_adapter(EARLIER / "two" / "second", "second")
    model.set_adapter("second")
    saved = load_file(EARLIER / "two" / "second" / "adapter_model.safetensors")
    assert saved and all(torch.equal(model.get_parameter(key), tensor) for key, tensor in saved.items())


# ---- checkpoints and studies of 99d97b5, which had each fact of a policy as a field

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
