"""Short trainings of each unit alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgicalError
from .adam_gain import gains_of
from .criterion import of_model
from .trial import Trial

PASSES = (1, 2, 4)  # through the training batches, after which units are compared
MANY = 8  # training batches: with fewer the last passes only learn them by heart, and are left out
MARGIN = 0.1  # behind the best one: too far to catch up
SIZE = 0.3  # 0 would measure a step by its largest entry, 0.5 by its length; set on the seen shifts
CHEAP = 0.2  # of the layers: a unit that needs no more of them run is trained, whatever its gradients say


@of_model(batches=16)
def probe(trial: Trial, *, pace: float = 0.5, thrift: float = 0.18) -> dict[str, float]:
    """`log(L_0 / L_u) - thrift * log(S_u / min S)`: how much of the held-out loss a short training of `u` alone takes.

    Every second batch is trained on, four times; those between are held out. `L_0` is the held-out loss before, `L_u`
    after Adam has tuned unit `u` from the same start. The first rate is `r_u = pace * loss / G_u`, where `G_u` is the
    `adam_gain` of the training batches: one step would, to first order, take the share `pace` of the loss away. So one
    setting fits a head of 650 weights and a block of millions. The rate falls linearly to 0.

    `S_u = r_u * n_u^0.3` says how large the steps of a unit with `n_u` weights are. Of two units that leave about the
    same loss, the second term prefers the one that needs smaller steps: it changes the model less, and in a whole
    training it was the better one (benchmarks/criteria).

    Rounds: all but a third of the units are given up before any step, by the second term alone, unless a step of
    theirs runs at most a fifth of the layers, as for the head and the last ones. After one pass, and after two, the
    better half goes on, of that only what is less than 0.1 behind the best, and a unit that is left alone is the
    choice. With fewer than 8 batches to train on there are two passes in all. A unit that is given up scores no more
    than the worst of those that go on.

    Range: any number, no unit; 0.7 = half of the loss is gone. Cost: gradients of half the batches; as many training
    steps for about half of the units, and again, up to three times, for two or three that are close, each pass with
    the held-out batches; layers below the unit are run once for each batch (`Prefix`). Memory: those layers' outputs,
    one gradient and two float32 numbers for each weight, and on the CPU each trained unit's weights with Adam's
    numbers.

    Raises:
        SurgicalError: fewer than 2 batches, or a loss that is not above 0.

    Source: ours; after successive halving, Jamieson and Talwalkar 2016. Known disagreement: none.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="probe")
    """
    train, held_out = halves(trial)
    rates = first_rates(trial, train, pace)
    start = trial.mean_loss(held_out)
    passes = PASSES if len(train) >= MANY else PASSES[:-1]
    runs = {name: Run((name,), rate, passes[-1] * len(train)) for name, rate in rates.items()}
    steps = {name: rate * sum(w.numel() for w in trial.units[name].values()) ** SIZE for name, rate in rates.items()}
    smallest = min(steps.values())

    def score(name: str, left: float) -> float:
        return math.log(start / max(left, 1e-6 * start)) - thrift * math.log(steps[name] / smallest)

    rounds = [{name: score(name, start) for name in rates}]
    kept = ranked(rounds[0])[: math.ceil(len(rates) / 3)]
    kept += [name for name in rates if name not in kept and trial.share_run(name) <= CHEAP]
    for done in passes:
        until = done * len(train)
        found = {name: score(name, runs[name].train(trial, train, until, held_out)) for name in kept}
        rounds.append(found)
        best, *others = ranked(found)[: math.ceil(len(found) / 2)]
        kept = [best, *(name for name in others if found[best] - found[name] < MARGIN)]
        if len(kept) == 1:
            break
    return reduce(lambda later, earlier: given_up(earlier, later), reversed(rounds))


def ranked(scores: dict[str, float]) -> list[str]:
    """The names, that with the highest score first."""
    return sorted(scores, key=lambda name: -scores[name])


def given_up(scores: dict[str, float], of_kept: dict[str, float]) -> dict[str, float]:
    """The scores of those that went on, and of the others what they had, at most the lowest of those that went on."""
    lowest = min(of_kept.values())
    return {name: of_kept[name] if name in of_kept else min(value, lowest) for name, value in scores.items()}


def halves(trial: Trial) -> tuple[range, range]:
    """The batches to train on, and those held out."""
    if len(trial.batches) < 2:
        raise SurgicalError(
            "a short training is judged on held-out batches and needs at least 2, got 1: give a larger num_batches, "
            "or smaller batches."
        )
    return range(0, len(trial.batches), 2), range(1, len(trial.batches), 2)


def first_rates(trial: Trial, ats: Sequence[int], pace: float) -> dict[str, float]:
    """For each unit the rate at which one step of Adam would, to first order, take the share `pace` of the loss away.

    Units without a gradient have none.
    """
    gains, loss = gains_of(trial, ats)
    if not loss > 0:
        raise SurgicalError(
            f"the loss is {loss:.4g} on average, and short trainings are compared by the share of it that they take "
            "away: it must be above 0. Give another loss_fn, or a criterion on gradients: 'adam_gain'."
        )
    if not any(gains.values()):
        raise SurgicalError("no unit has a gradient: the loss does not depend on any weight that is scored.")
    return {name: pace * loss / each for name, each in gains.items() if each > 0}


@dataclass
class Run:
    """A short training of some units together, which can be broken off and gone on with.

    Attributes:
        names: the units.
        rate: the first rate.
        steps: after how many steps the rate has fallen to 0.
    """

    names: tuple[str, ...]
    rate: float
    steps: int
    _done: int = 0
    _weights: list[Tensor] = field(default_factory=list)
    _moments: dict[str, Any] = field(default_factory=dict)

    def train(self, trial: Trial, ats: Sequence[int], until: int, held_out: Sequence[int]) -> float:
        """Go on to the step `until` on some batches; returns the loss on others. The model is left as it was."""
        with trial.training(*self.names) as units:
            weights = [weight for unit in units.values() for weight in unit]
            optimizer = torch.optim.Adam(weights, lr=self.rate)
            if self._done:
                optimizer.load_state_dict(self._moments)
                with torch.no_grad():
                    for weight, value in zip(weights, self._weights, strict=True):
                        weight.copy_(value)
            trial.steps(optimizer, ats, range(self._done, until), self.rate, self.steps)
            self._done = until
            self._weights = [weight.detach().to("cpu", copy=True) for weight in weights]
            self._moments = copy.deepcopy(optimizer.state_dict())
            return trial.mean_loss(held_out)
