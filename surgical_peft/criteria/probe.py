"""Short trainings of each unit alone."""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise

from ..errors import SurgicalError
from .budget import GRADIENTS
from .criterion import GIVEN_UP, GUESSED, of_model
from .depth_gain import by_depth
from .short_training.context import ScoringContext
from .short_training.short_run import WORST, ShortRun, gains_and_loss, log_loss_reduction

PACE = 0.5  # the share of the loss that one step would take away, to first order
PASSES = (1, 2, 4)  # through the training batches, after which units are compared
FAVORITES = 0.1  # of the units: those that are trained because gradients speak for them
CHEAP = 0.2  # of the layers: a unit that needs no more of them run is trained, whatever its gradients say
MARGIN = 0.1  # behind the best one: too far to catch up
SLOPE = 0.25  # what a logarithm of `depth_gain` is worth in the score
FEW = 8  # batches: on 5, of 8 images each, a ViT-S chose one of its worst blocks, on 8 a good one


@of_model(batches=16)
def probe(context: ScoringContext, *, pace: float = PACE, thrift: float = 0.15) -> dict[str, float]:
    """`log(L_0 / L_u) - thrift * log(r_u / min r)`: how much of the loss a short training of `u` alone takes.

    Two trainings, one on every second batch and one on those between, each judged on the batches of the other. `L_0`
    is the mean loss before, `L_u` that after Adam has tuned unit `u` from the same start, up to four times through
    either half. The first rate is `r_u = pace * L_0 / G_u`, where `G_u` is the `adam_gain` of all batches: one step
    would, to first order, take the share `pace` of the loss away. So one setting fits a head of 650 weights and a
    block of millions. The rate falls linearly to 0. Of two units that leave about the same loss, the second term
    prefers the one that needs the smaller rate: it changes the model less, and in a whole training it was the better
    one (benchmarks/criteria). `min r` is over all units that have a gradient.

    Rounds: trained is a tenth of the units, rounded up, those with the highest `depth_gain`, and the units a step of
    which runs at most a fifth of the layers, as for the head and the last ones. After one pass, and after two, the
    better half goes on, or the better two, of those only what is less than 0.1 behind the best, and a unit that is
    left alone is the choice. A unit that is given up scores no more than the worst of those that go on. One that was
    never trained has the score of the favorite of `depth_gain`, less a quarter for each factor `e` that its
    `depth_gain` is smaller; it may stand above some that were trained.

    Within a budget: as many batches, up to all, as leave room for their gradients and the first round, whichever units
    the gradients favor; where that is fewer than 8, 8 batches and of the units those with the highest `depth_gain`
    that fit; later rounds as far as they fit. Where not even two units can be trained: a quarter of the logarithm of
    `depth_gain` on as many batches as fit.

    Range: any number, no unit: about 0.7 where half of the loss is gone, below zero where nothing is won for the rate
    that it takes, -14 where a training diverged. Cost: gradients of all batches; as many training steps for each unit
    that is trained, most of them late and cheap, and again, up to three times, for two that are close, each round with
    a forward pass of the batches; layers below the unit are run once for each batch (`Prefix`). Memory: those layers'
    outputs, one gradient and two float32 numbers for each weight, and on the CPU, twice, the weights in the race with
    Adam's numbers.

    Raises:
        SurgicalError: fewer than 2 batches; a loss that is not above 0; a loss or a gradient that is NaN or infinite;
            every training diverged.

    Source: ours; after successive halving, Jamieson and Talwalkar 2016. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="probe")
    """
    is_race = _fitted(context)
    gains, start = gains_and_loss(context, least=2 if is_race else 1)
    rates = {name: pace * start / gain for name, gain in gains.items()}
    smallest = min(rates.values())
    prior = {name: SLOPE * math.log(value) for name, value in by_depth(context, gains).items()}
    kept = ranked(prior)[: math.ceil(FAVORITES * len(prior))]
    favorite = kept[0]
    kept += [name for name in rates if name not in kept and context.share_run(name) <= CHEAP]
    context.basis.update(dict.fromkeys(prior, GUESSED))
    if context.budget.is_given:
        kept = _paid(context, [name for name in ranked(prior) if name in kept])
        if not is_race or favorite not in kept or len(kept) < min(2, len(prior)):
            return prior
    runs = {name: ShortRun((name,), rates[name], PASSES[-1]) for name in kept}
    rounds: list[dict[str, float]] = []
    for before, done in pairwise((0, *PASSES)):
        cost = sum(context.cost(name, passes=done - before) for name in runs)
        if rounds and cost > context.budget.left:
            break
        context.budget.stage(f"{len(runs)} units, each trained alone: pass {done} of {PASSES[-1]}", cost)
        left = {name: run.train(context, done) for name, run in runs.items()}
        if not any(loss < WORST * start for loss in left.values()):
            raise SurgicalError(
                "every short training diverged, so none is better: look at the batches, or give a smaller pace="
                f"{pace}."
            )
        scores = {
            n: log_loss_reduction(start, loss) - thrift * math.log(rates[n] / smallest) for n, loss in left.items()
        }
        rounds.append(scores)
        best, *others = ranked(scores)[: max(2, math.ceil(len(scores) / 2))]
        runs = {name: runs[name] for name in (best, *(n for n in others if scores[best] - scores[n] < MARGIN))}
        if len(runs) == 1:
            break
    context.basis.update(dict.fromkeys(kept, GIVEN_UP))
    for name in rounds[-1]:
        del context.basis[name]
    scores = reduce(lambda later, earlier: given_up(earlier, later), reversed(rounds))
    return {name: scores.get(name, scores[favorite] + prior[name] - prior[favorite]) for name in rates}


def _fitted(context: ScoringContext) -> bool:
    """Drop the batches that the budget has no room for; True if it has room for training on the rest."""
    budget, count = context.budget, len(context.batches)
    few = min(FEW, count)
    if not budget.is_given or count < 2:
        return True
    if budget.left > GRADIENTS * few:
        context.mean_loss(range(1))  # records which layers each unit needs
        costs = {name: context.cost(name) / count for name in context.units}  # of a batch
        dear = sorted(costs.values(), reverse=True)
        cheap = sum(cost for name, cost in costs.items() if context.share_run(name) <= CHEAP)
        whole = GRADIENTS + sum(dear[: math.ceil(FAVORITES * len(dear))]) + cheap
        room = int(budget.left / whole)
        if room >= few or budget.left >= few * (GRADIENTS + dear[0] + dear[-1]):
            context.keep(max(few, room))
            return True
    context.keep(budget.affordable(count, GRADIENTS, "the gradients of one batch"))
    return False


def _paid(context: ScoringContext, names: list[str]) -> list[str]:
    """The best units whose first round fits into the budget."""
    paid, left = [], context.budget.left
    for name in names:
        if (cost := context.cost(name)) <= left:
            paid.append(name)
            left -= cost
    return paid


def ranked(scores: dict[str, float]) -> list[str]:
    """The names, highest score first."""
    return sorted(scores, key=lambda name: -scores[name])


def given_up(scores: dict[str, float], of_kept: dict[str, float]) -> dict[str, float]:
    """Scores of the kept units, and of the others their own, capped at the lowest of the kept."""
    lowest = min(of_kept.values())
    return {name: of_kept[name] if name in of_kept else min(value, lowest) for name, value in scores.items()}
