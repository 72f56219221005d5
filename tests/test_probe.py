"""The probe against plain trainings of copies, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgical_peft import BlockMap, SurgicalError, score_blocks
from surgical_peft.criteria.criterion import of_model
from surgical_peft.criteria.trial import Trial
from surgical_peft.recipe import load_recipe
from surgical_peft.train import score

from .toys import TOYS, Toy

RECIPES = Path(__file__).parents[1] / "recipes"
PACE, THRIFT, SIZE, MARGIN = 0.5, 0.18, 0.3, 0.1


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def mean_loss(model: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


def plain_probe(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """Every unit trained on a copy of its own; all of them to the end, and who is given up told afterwards."""
    train, held_out = batches[::2], batches[1::2]
    units = {name: list(named) for name, named in BlockMap.find(model).named_parameters(model).items()}
    parameters = dict(model.named_parameters())
    grads: list[dict[str, Tensor]] = []
    for batch in train:
        found = torch.autograd.grad(loss_of(model, batch), list(parameters.values()), allow_unused=True)
        grads.append(
            {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(parameters, found, strict=True)}
        )
    gains = {}
    for name, paths in units.items():
        gain = 0.0
        for path in paths:
            mean = torch.stack([each[path] for each in grads]).mean(0)
            square = torch.stack([each[path] ** 2 for each in grads]).mean(0)
            gain += (mean**2 / square.sqrt()).nan_to_num(0.0).sum().item()
        gains[name] = gain
    start = mean_loss(model, held_out)
    level = sum(loss_of(model, batch).item() for batch in train) / len(train)
    rates = {name: PACE * level / gain for name, gain in gains.items()}
    passes = (1, 2, 4) if len(train) >= 8 else (1, 2)
    left: dict[int, dict[str, float]] = {done: {} for done in passes}
    for name, paths in units.items():
        own = copy.deepcopy(model)
        weights = [weight for path, weight in own.named_parameters() if path in paths]
        optimizer = torch.optim.Adam(weights)
        for step, batch in enumerate(train * passes[-1]):
            optimizer.param_groups[0]["lr"] = rates[name] * (1 - step / (passes[-1] * len(train)))
            own.zero_grad()
            loss_of(own, batch).backward()
            optimizer.step()
            if (step + 1) % len(train) == 0 and (done := (step + 1) // len(train)) in passes:
                left[done][name] = mean_loss(own, held_out)

    sizes = {name: sum(parameters[path].numel() for path in paths) for name, paths in units.items()}
    thrifty = {name: -THRIFT * math.log(rates[name] * sizes[name] ** SIZE) for name in units}
    scores = {name: value - max(thrifty.values()) for name, value in thrifty.items()}
    after = {done: {name: math.log(start / left[done][name]) + scores[name] for name in units} for done in passes}
    layers = [name for name in units if name.isdigit()]
    cheap = {"final_norm", "head", *layers[len(layers) - len(layers) // 5 :]} & units.keys()
    racing = {*sorted(units, key=lambda name: -scores[name])[: -(-len(units) // 3)], *cheap}
    given_up_in = []  # each round's losers, with what they had
    for done in passes:
        given_up_in.append({name: value for name, value in scores.items() if name not in racing})
        scores = {name: after[done][name] for name in racing}
        best = max(scores.values())
        better = sorted(racing, key=lambda name: -scores[name])[: -(-len(racing) // 2)]
        racing = {name for name in better if best - scores[name] < MARGIN}
        if len(racing) == 1:
            break
    for losers in reversed(given_up_in):
        worst = min(scores.values())
        scores |= {name: min(value, worst) for name, value in losers.items()}
    return scores


@pytest.mark.parametrize("count", [9, 16])
@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_it_equals_plain_trainings_of_copies(name: str, count: int) -> None:
    toy = TOYS[name]
    batches = [
        {key: value.double() if value.is_floating_point() else value for key, value in toy.batch(seed).items()}
        for seed in range(count)
    ]
    scores = score_blocks(toy.model().double(), batches, "probe")
    assert scores.values == pytest.approx(plain_probe(toy.model().double(), batches), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("recipe", "best"), [("noise.yaml", {"embeddings", "0"}), ("label_map.yaml", {"head"})])
def test_it_finds_the_right_block_of_the_shipped_model(recipe: str, best: set[str]) -> None:
    """On noise both are as good (benchmarks/criteria)."""
    scores = score(load_recipe(RECIPES / recipe)).values
    assert max(scores, key=scores.__getitem__) in best


@pytest.mark.parametrize(("last", "share"), [("0", 1.0), ("9", 0.25), ("11", 1 / 12), ("head", 0.0)])
def test_a_step_runs_the_layers_from_its_unit_on(last: str, share: float, vit: Toy) -> None:
    shares: dict[str, float] = {}

    @of_model(batches=1)
    def asking(trial: Trial) -> dict[str, float]:
        trial.loss(0)
        shares.update({name: trial.share_run(name) for name in trial.units})
        return shares

    score_blocks(vit.model(), [vit.batch()], asking)
    assert shares[last] == pytest.approx(share)


def test_a_unit_without_a_gradient_is_left_out(vit: Toy) -> None:
    model = vit.model()
    model.vit.layers[4].register_forward_hook(lambda module, args, output: args[0])
    scores = score_blocks(model, [vit.batch(seed) for seed in range(4)], "probe")
    assert scores.unscored == ("4",)


@pytest.mark.parametrize(
    ("count", "loss_fn", "why"),
    [
        (1, loss_of, "needs at least 2, got 1"),
        (4, lambda model, batch: -loss_of(model, batch), "must be above 0"),
        (4, lambda model, batch: torch.ones((), requires_grad=True) * 2, "does not depend on any weight"),
    ],
)
def test_what_cannot_be_probed_is_refused(count: int, loss_fn: Any, why: str, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match=why):
        score_blocks(vit.model(), [vit.batch(seed) for seed in range(count)], "probe", loss_fn=loss_fn)


def test_a_run_that_was_broken_off_goes_on_as_if_it_had_not_been(vit: Toy) -> None:
    """With one batch to train on, half time is the end already."""
    scores = score_blocks(vit.model(), [vit.batch(0), vit.batch(1)], "probe")
    assert all(map(math.isfinite, scores.values.values()))
