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
from surgical_peft.criteria.short_training.context import ScoringContext
from surgical_peft.experiments.recipe import load_recipe
from surgical_peft.experiments.training.train import score
from tests.support.criteria import plain_depth_gain
from tests.support.toys import TOYS, Toy

RECIPES = Path(__file__).parents[2] / "recipes"
PACE, THRIFT, MARGIN, SLOPE, PASSES = 0.5, 0.15, 0.1, 0.25, (1, 2, 4)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def mean_loss(model: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


def plain_gains(model: nn.Module, batches: list[Any], units: dict[str, list[str]]) -> dict[str, float]:
    """`adam_gain` by its formula."""
    parameters = dict(model.named_parameters())
    grads: list[dict[str, Tensor]] = []
    for batch in batches:
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
    return gains


def plain_losses(
    model: nn.Module, train: list[Any], held_out: list[Any], paths: list[str], rate: float
) -> list[float]:
    """The held-out loss after each of the passes of a copy, of which only these weights are trained."""
    own = copy.deepcopy(model)
    optimizer = torch.optim.Adam([weight for path, weight in own.named_parameters() if path in paths])
    left = []
    for step, batch in enumerate(train * PASSES[-1]):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / (PASSES[-1] * len(train)))
        own.zero_grad()
        loss_of(own, batch).backward()
        optimizer.step()
        if (step + 1) % len(train) == 0 and (step + 1) // len(train) in PASSES:
            left.append(mean_loss(own, held_out))
    return left


def plain_probe(model: nn.Module, batches: list[Any]) -> dict[str, float]:
    """Every unit trained on copies of its own; all of them to the end, and who is given up told afterwards."""
    halves = batches[::2], batches[1::2]
    units = {name: list(named) for name, named in BlockMap.find(model).named_parameters(model).items()}
    gains = plain_gains(model, batches, units)
    start = mean_loss(model, batches)
    rates = {name: PACE * start / gain for name, gain in gains.items()}
    after: dict[str, list[float]] = {}
    for name, paths in units.items():
        one, other = (plain_losses(model, *pair, paths, rates[name]) for pair in (halves, halves[::-1]))
        left = [(len(halves[1]) * a + len(halves[0]) * b) / len(batches) for a, b in zip(one, other, strict=True)]
        thrifty = -THRIFT * math.log(rates[name] / min(rates.values()))
        after[name] = [math.log(start / loss) + thrifty for loss in left]

    prior = {name: SLOPE * math.log(value) for name, value in plain_depth_gain(model, gains).items()}
    favorites = sorted(units, key=lambda name: -prior[name])[: -(-len(units) // 10)]
    layers = [name for name in units if name.isdigit()]
    cheap = {"final_norm", "head", *layers[len(layers) - len(layers) // 5 :]} & units.keys()
    racing = {*favorites, *cheap}
    scores = dict.fromkeys(racing, 0.0)
    given_up_in: list[dict[str, float]] = []  # each round's losers, with what they had
    for at in range(len(PASSES)):
        given_up_in.append({name: value for name, value in scores.items() if name not in racing})
        scores = {name: after[name][at] for name in racing}
        best = max(scores.values())
        better = sorted(racing, key=lambda name: -scores[name])[: max(2, -(-len(racing) // 2))]
        racing = {name for name in better if best - scores[name] < MARGIN}
        if len(racing) == 1:
            break
    for losers in reversed(given_up_in):
        worst = min(scores.values())
        scores |= {name: min(value, worst) for name, value in losers.items()}
    untrained = {name: scores[favorites[0]] - (prior[favorites[0]] - prior[name]) for name in units}
    return untrained | scores


@pytest.mark.parametrize(("name", "count"), [("bert", 2), ("llama", 3), ("bert", 9), ("vit", 2)])
def test_it_equals_plain_trainings_of_copies(name: str, count: int) -> None:
    toy = TOYS[name]
    batches = [
        {key: value.double() if value.is_floating_point() else value for key, value in toy.batch(seed).items()}
        for seed in range(count)
    ]
    scores = score_blocks(toy.model().double(), batches, "probe")
    assert scores.values == pytest.approx(plain_probe(toy.model().double(), batches), rel=1e-6, abs=1e-9)


def test_it_says_which_scores_are_no_measurements() -> None:
    toy = TOYS["vit"]
    scores = score_blocks(toy.model(), [toy.batch(seed) for seed in range(2)], "probe")
    trained = {name for name in scores.values if scores.basis.get(name) != "guessed"}
    assert {"head", "final_norm"} <= trained and set(scores.basis.values()) == {"given up", "guessed"}
    assert max(scores.values[name] for name in scores.basis if name in trained) <= min(
        scores.values[name] for name in trained - scores.basis.keys()
    )


@pytest.mark.parametrize(("recipe", "best"), [("noise.yaml", {"embeddings", "0"}), ("label_map.yaml", {"head"})])
def test_it_finds_the_right_block_of_the_shipped_model(recipe: str, best: set[str]) -> None:
    """On noise both are as good (benchmarks/criteria)."""
    scores = score(load_recipe(RECIPES / recipe)).values
    assert max(scores, key=scores.__getitem__) in best


@pytest.mark.parametrize(("last", "share"), [("0", 1.0), ("9", 0.25), ("11", 1 / 12), ("head", 0.0)])
def test_a_step_runs_the_layers_from_its_unit_on(last: str, share: float, vit: Toy) -> None:
    shares: dict[str, float] = {}

    @of_model(batches=1)
    def asking(context: ScoringContext) -> dict[str, float]:
        context.loss(0)
        shares.update({name: context.share_run(name) for name in context.units})
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
        (1, loss_of, "at least 2"),
        (4, lambda model, batch: -loss_of(model, batch), "above 0"),
        (4, lambda model, batch: torch.ones((), requires_grad=True) * 2, "does not depend"),
    ],
)
def test_what_cannot_be_probed_is_refused(count: int, loss_fn: Any, why: str, vit: Toy) -> None:
    with pytest.raises(SurgicalError, match=why):
        score_blocks(vit.model(), [vit.batch(seed) for seed in range(count)], "probe", loss_fn=loss_fn)


@pytest.mark.parametrize("criterion", ["probe", "depth_gain"])
def test_a_bad_batch_is_named(criterion: str, vit: Toy) -> None:
    batches = [vit.batch(seed) for seed in range(4)]
    batches[2]["pixel_values"][0, 0, 0, 0] = math.inf
    with pytest.raises(SurgicalError, match=r"loss.*batch 2.*NaN"):
        score_blocks(vit.model(), batches, criterion)


@pytest.mark.parametrize("criterion", ["probe", "depth_gain"])
def test_a_bad_gradient_is_named(criterion: str, vit: Toy) -> None:
    model = vit.model()
    next(model.vit.layers[5].parameters()).register_hook(lambda grad: grad * math.nan)
    with pytest.raises(SurgicalError, match=r"gradient.*'5'.*batch 0.*NaN"):
        score_blocks(model, [vit.batch(seed) for seed in range(4)], criterion)


def test_a_training_that_diverges_comes_last(vit: Toy) -> None:
    """The head's steps are so large that nothing is left of it; the others are judged as always."""
    model = vit.model()
    batches = [vit.batch(seed) for seed in range(4)]
    expected = score_blocks(model, batches, "probe").values

    def blown_up(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = loss_of(model, batch)
        trained = next(model.classifier.parameters()).requires_grad and not model.vit.layernorm.weight.requires_grad
        return loss * math.inf if trained else loss

    scores = score_blocks(model, batches, "probe", loss_fn=blown_up).values
    assert min(scores, key=scores.__getitem__) == "head" and scores["head"] < -13
    assert {name: scores[name] for name in ("final_norm", "11")} == {n: expected[n] for n in ("final_norm", "11")}
