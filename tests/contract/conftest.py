"""Every family in turn, as it is and with a saved adapter."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import get_peft_model

from surgical_peft import SurgicalConfig

from ..families import FAMILIES
from ..toys import Toy
from .wrapping import Saved, base_logits, logits, no_warnings, nudge


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Trainer collects garbage around every training: half a second over all that torch and transformers hold."""
    gc.collect()
    gc.freeze()


# Each is built otherwise; these are in all that matters here like qwen3_moe, bert, and resnet with swin.
ALIKE = ("llama", "modernbert", "convnext")
BUILDS = [name for name in FAMILIES if name not in ALIKE]


@pytest.fixture(params=BUILDS)
def family(request: pytest.FixtureRequest) -> Toy:
    """Every build in turn: what PEFT promises is promised for all."""
    return FAMILIES[request.param]


@pytest.fixture(scope="module", params=BUILDS)
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
