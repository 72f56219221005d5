"""Every family in turn, as it is and with a saved adapter."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import get_peft_model

from surgical_peft import SurgicalConfig
from tests.support.families import FAMILIES
from tests.support.toys import Toy
from tests.support.wrapping import Saved, base_logits, logits, no_warnings, nudge


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Trainer collects garbage around every training: half a second over all that torch and transformers hold."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Toy:
    """Every family in turn: what PEFT promises is promised for all."""
    return FAMILIES[request.param]


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    family = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(family.name)
    family.model().save_pretrained(directory / "base")
    base = type(family.model()).from_pretrained(directory / "base")
    model = get_peft_model(base, SurgicalConfig(blocks=[family.first, family.last]))
    tuned_logits = logits(nudge(model), family.batch())
    assert not torch.allclose(base_logits(family), tuned_logits)
    with no_warnings():
        model.save_pretrained(directory / "adapter")
    return Saved(family, directory / "base", directory / "adapter", base_logits(family), tuned_logits)
