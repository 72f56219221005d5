"""`recipes/neighbours/`: two steps of each script; what should train does, and all else stays bit-equal."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from surgical_peft.blocks.unwrap import unwrap_module
from tests.support.toys import TOYS

NEIGHBOURS = Path(__file__).parents[2] / "recipes" / "neighbours"
SCRIPTS = sorted(path.stem for path in NEIGHBOURS.glob("*.py"))
FIRST = ("vit.embeddings.", "vit.layers.0.", "vit.layers.1.")


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(NEIGHBOURS / f"{name}.py"))


def test_every_neighbour_is_answered() -> None:
    """Seed 002 names six; each has a script or the reason why not."""
    readme = (NEIGHBOURS / "README.md").read_text()
    rows = [line for line in readme.splitlines() if re.match(r"\| .*arxiv\.org", line)]
    assert len(rows) == 6
    assert sorted(re.findall(r"\((\w+)\.py\)", readme)) == SCRIPTS
    assert all(".py)" in row or "| none: " in row for row in rows)


@pytest.mark.parametrize(
    ("name", "tuned", "new"),
    [
        ("co_finetuning", FIRST, None),
        ("auxiliary_head", FIRST, "rotation"),
        ("bi_tuning", (*FIRST, "classifier."), "projector"),
    ],
)
def test_images(
    name: str, tuned: tuple[str, ...], new: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where runs/ goes
    model, measured = script(name)["main"](["--max-steps", "2"])
    if new:
        module = model.get_base_model().get_submodule(new)
        after = {each.rpartition(".")[2]: found for each, found in module.named_parameters() if found.requires_grad}
        with model.disable_adapter():
            before = dict(unwrap_module(module).named_parameters())
        assert after.keys() == before.keys() and not any(torch.equal(after[key], before[key]) for key in before)
    else:
        assert measured["upstream"] > measured["downstream"]  # clean images, which the model knows, and noisy ones
    merged = dict(model.merge_and_unload().named_parameters())
    source = AutoModelForImageClassification.from_pretrained(NEIGHBOURS.parent / "fashion_mnist" / "vit")
    for key, weight in source.named_parameters():
        assert torch.equal(merged[key], weight) != key.startswith(tuned), key
    assert {key.split(".")[0] for key in merged.keys() - dict(source.named_parameters())} == ({new} if new else set())


def test_rotations_are_told() -> None:
    rotate = script("auxiliary_head")["rotate"]
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 3.0).reshape(2, 1, 3, 3).repeat(8, 1, 1, 1)
    turned, turns = rotate(images)
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for image, after, count in zip(images, turned, turns.tolist(), strict=True):
        assert torch.equal(image, after.rot90(4 - count, dims=(-2, -1)))


def test_contrastive_loss_against_loops() -> None:
    contrastive, temperature = (script("bi_tuning")[key] for key in ("contrastive", "TEMPERATURE"))
    torch.manual_seed(0)
    projections, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 2, 0, 1])
    unit = [row / row.norm() for row in projections]
    losses = []
    for i in range(6):
        others = [a for a in range(6) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        below = sum(torch.exp(unit[i] @ unit[a] / temperature) for a in others)
        terms = [-torch.log(torch.exp(unit[i] @ unit[p] / temperature) / below) for p in positives]
        losses += [sum(terms) / len(terms)] if terms else []
    assert len(losses) == 5  # the only one of its class has no part in it
    torch.testing.assert_close(contrastive(projections, labels), sum(losses) / 5)
    alone = projections[:3].requires_grad_()
    loss = contrastive(alone, torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss == 0 and alone.grad is not None and not alone.grad.any()


def test_prompt_tuning(tmp_path: Path) -> None:
    functions, toy = script("prompt_tuning"), TOYS["llama"]
    model: nn.Module = functions["with_prompt_and_blocks"](toy.model(), [0, "final_norm"], tokens=3)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for step in range(2):
        model(**toy.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    tuned = ("model.layers.0.", "model.norm.", "prompt_encoder.")
    assert changed == {name for name in start if any(part in name for part in tuned)}
    functions["save"](model, tmp_path)
    loaded = functions["load"](toy.model(), tmp_path)
    batch = toy.batch(7)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, model.eval()(**batch).logits)
        assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1] + 3
