"""From scores to a resumed training on models whose layers the user names once, in a fresh process at the end."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from surgical_peft import (
    BlockMap,
    SurgicalConfig,
    create_surgical_optimizer,
    export_to_peft,
    policies,
    run_search,
    score_blocks,
    top_k,
)
from tests.contract.test_processes import run
from tests.support.unusual import UNUSUAL, Unusual

RESUMES = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from surgical_peft import BlockMap
from tests.contract.test_unusual_layers import digest, optimizer_of, step
from tests.support.unusual import UNUSUAL

folder = Path(sys.argv[1])
toy = UNUSUAL[folder.name]
model = PeftModel.from_pretrained(toy.model(), folder, is_trainable=True)
optimizer = optimizer_of(model)
optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
step(model, optimizer, toy.batch(1))
print(json.dumps({"digest": digest(model), "blocks": BlockMap.find(model).names}))
"""


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return create_surgical_optimizer(
        model, torch.optim.AdamW, lr=1e-2, policy=policies.lisa(num_blocks=1, every=1, seed=3)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def digest(model: nn.Module) -> str:
    weights = (f"{name} {weight.tolist()}" for name, weight in model.state_dict().items())
    return hashlib.sha256("\n".join(weights).encode()).hexdigest()


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_layers_are_named_once(name: str, tmp_path: Path) -> None:
    toy: Unusual = UNUSUAL[name]
    base, folder = toy.model(), tmp_path / name
    scores = score_blocks(base, [toy.batch()], blocks=BlockMap.from_layers(base, toy.layers))
    model = get_peft_model(base, SurgicalConfig.from_selection(top_k(scores, len(toy.blocks) - 2)))
    optimizer = optimizer_of(model)
    step(model, optimizer, toy.batch())
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    step(model, optimizer, toy.batch(1))
    assert run(RESUMES, folder) == {"digest": digest(model), "blocks": list(toy.blocks)}


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_search_tells_its_objective_the_layers(name: str) -> None:
    toy: Unusual = UNUSUAL[name]

    def tuned(selection: object) -> float:
        model = get_peft_model(toy.model(), SurgicalConfig.from_selection(selection))
        return -sum(weight.numel() for weight in model.parameters() if weight.requires_grad)

    result = run_search("sweep", tuned, blocks=BlockMap.from_layers(toy.model(), toy.layers))
    best = type(result).from_json(result.to_json()).best
    assert BlockMap.find(get_peft_model(toy.model(), SurgicalConfig.from_selection(best))).names == toy.blocks


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_exported_needs_no_layers(name: str, tmp_path: Path) -> None:
    toy: Unusual = UNUSUAL[name]
    model = get_peft_model(toy.model(), SurgicalConfig(blocks=[toy.last, "head"], layers=toy.layers))
    step(model, optimizer_of(model), toy.batch())
    model.save_pretrained(tmp_path / "adapter")
    export_to_peft(tmp_path / "adapter", tmp_path / "stock", base_model=toy.model())
    stock = PeftModel.from_pretrained(toy.model(), tmp_path / "stock").eval()
    with torch.no_grad():
        assert torch.equal(stock(**toy.batch()).logits, model.eval()(**toy.batch()).logits)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.split(".")[2] for key in saved} == {name_of(toy.layers), "head"}


def name_of(layers: str | list[str]) -> str:
    return (layers if isinstance(layers, str) else layers[-1]).partition(".")[0]
