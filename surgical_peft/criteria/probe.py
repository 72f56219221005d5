"""Short trainings of each unit alone."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgicalError
from .adam_gain import gains_of
from .criterion import of_model
from .depth_gain import by_depth
from .trial import Trial

PASSES = (1, 2, 4)  # through the training batches, after which units are compared
FAVOURITES = 0.1  # of the units: those that are trained because gradients speak for them
CHEAP = 0.2  # of the layers: a unit that needs no more of them run is trained, whatever its gradients say
MARGIN = 0.1  # behind the best one: too far to catch up
SLOPE = 0.25  # what a logarithm of `depth_gain` is worth in the score


@of_model(batches=16)
def probe(trial: Trial, *, pace: float = 0.5, thrift: float = 0.15) -> dict[str, float]:
    """`log(L_0 / L_u) - thrift * log(r_u / min r)`: how much of the loss a short training of `u` alone takes.

    Two trainings, one on every second batch and one on those between, each judged on the batches of the other. `L_0`
    is the mean loss before, `L_u` that after Adam has tuned unit `u` from the same start, up to four times through
    either half. The first rate is `r_u = pace * L_0 / G_u`, where `G_u` is the `adam_gain` of all batches: one step
    would, to first order, take the share `pace` of the loss away. So one setting fits a head of 650 weights and a
    block of millions. The rate falls linearly to 0. Of two units that leave about the same loss, the second term
    prefers the one that needs the smaller rate: it changes the model less, and in a whole training it was the better
    one (benchmarks/criteria).

    Rounds: a tenth of the units is trained, those with the highest `depth_gain`, and the units a step of which runs at
    most a fifth of the layers, as for the head and the last ones. After one pass, and after two, the better half goes
    on, or the better two, of those only what is less than 0.1 behind the best, and a unit that is left alone is the
    choice. A unit that is given up scores no more than the worst of those that go on. One that was never trained has
    the score of the favourite of `depth_gain`, less a quarter for each factor `e` that its `depth_gain` is smaller.

    Range: any number, no unit; 0.7 = half of the loss is gone. Cost: gradients of all batches; as many training
    steps for about half of the units, most of them late and cheap, and again, up to three times, for two that are
    close, each pass with a forward pass of the batches; layers below the unit are run once for each batch (`Prefix`).
    Memory: those layers' outputs, one gradient and two float32 numbers for each weight, and on the CPU each trained
    unit's weights with Adam's numbers, twice.

    Raises:
        SurgicalError: fewer than 2 batches, or a loss that is not above 0.

    Source: ours; after successive halving, Jamieson and Talwalkar 2016. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="probe")
    """
    gains, start = gains_to_pace(trial)
    rates = {name: pace * start / gain for name, gain in gains.items()}
    smallest = min(rates.values())

    def score(name: str, left: float) -> float:
        return math.log(start / max(left, 1e-6 * start)) - thrift * math.log(rates[name] / smallest)

    prior = {name: SLOPE * math.log(value) for name, value in by_depth(trial, gains).items()}
    favourite, *others = ranked(prior)[: math.ceil(FAVOURITES * len(prior))]
    kept = [favourite, *others]
    kept += [name for name in rates if name not in kept and trial.share_run(name) <= CHEAP]
    runs = {name: Run((name,), rates[name], PASSES[-1]) for name in kept}
    rounds = []
    for done in PASSES:
        found = {name: score(name, runs[name].train(trial, done)) for name in kept}
        rounds.append(found)
        best, *others = ranked(found)[: max(2, math.ceil(len(found) / 2))]
        kept = [best, *(name for name in others if found[best] - found[name] < MARGIN)]
        if len(kept) == 1:
            break
    scores = reduce(lambda later, earlier: given_up(earlier, later), reversed(rounds))
    return {name: scores.get(name, scores[favourite] + prior[name] - prior[favourite]) for name in rates}


def ranked(scores: dict[str, float]) -> list[str]:
    """The names, that with the highest score first."""
    return sorted(scores, key=lambda name: -scores[name])


def given_up(scores: dict[str, float], of_kept: dict[str, float]) -> dict[str, float]:
    """The scores of those that went on, and of the others what they had, at most the lowest of those that went on."""
    lowest = min(of_kept.values())
    return {name: of_kept[name] if name in of_kept else min(value, lowest) for name, value in scores.items()}


def gains_to_pace(trial: Trial) -> tuple[dict[str, float], float]:
    """The `adam_gain` of each unit that has a gradient, and the mean loss, for the rates of short trainings.

    Raises:
        SurgicalError: what cannot be trained on one half and judged on the other, or paced by its loss.
    """
    if len(trial.batches) < 2:
        raise SurgicalError(
            "a short training is judged on held-out batches and needs at least 2, got 1: give a larger num_batches, "
            "or smaller batches."
        )
    gains, loss = gains_of(trial, range(len(trial.batches)))
    if not loss > 0:
        raise SurgicalError(
            f"the loss is {loss:.4g} on average, and short trainings are compared by the share of it that they take "
            "away: it must be above 0. Give another loss_fn, or a criterion on gradients: 'adam_gain'."
        )
    if not any(gains.values()):
        raise SurgicalError("no unit has a gradient: the loss does not depend on any weight that is scored.")
    return {name: gain for name, gain in gains.items() if gain > 0}, loss


@dataclass
class Run:
    """Short trainings of some units together, one on either half of the batches, which can be gone on with.

    Attributes:
        names: the units.
        rate: the first rate.
        passes: through a half, after which the rate has fallen to 0.
    """

    names: tuple[str, ...]
    rate: float
    passes: int
    _done: int = 0
    _weights: dict[range, list[Tensor]] = field(default_factory=dict)  # of the training on each half
    _moments: dict[range, dict[str, Any]] = field(default_factory=dict)

    def train(self, trial: Trial, until: int) -> float:
        """Go on to the end of the pass `until`; returns the mean loss, each batch's by the training without it.

        The model is left as it was.
        """
        count = len(trial.batches)
        one, other = range(0, count, 2), range(1, count, 2)
        losses = [len(held) * self._train_on(ats, trial, until, held) for ats, held in ((one, other), (other, one))]
        self._done = until
        return sum(losses) / count

    def _train_on(self, ats: range, trial: Trial, until: int, held_out: range) -> float:
        with trial.training(*self.names) as units:
            weights = [weight for unit in units.values() for weight in unit]
            optimizer = torch.optim.Adam(weights, lr=self.rate)
            if self._done:
                optimizer.load_state_dict(self._moments[ats])
                with torch.no_grad():
                    for weight, value in zip(weights, self._weights[ats], strict=True):
                        weight.copy_(value)
            steps = range(self._done * len(ats), until * len(ats))
            trial.steps(optimizer, ats, steps, self.rate, self.passes * len(ats))
            self._weights[ats] = [weight.detach().to("cpu", copy=True) for weight in weights]
            self._moments[ats] = copy.deepcopy(optimizer.state_dict())
            return trial.mean_loss(held_out)
