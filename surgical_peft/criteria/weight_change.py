"""How far weights move in a short training of everything."""

from __future__ import annotations

import torch

from .criterion import of_model, whole
from .rgn import norm
from .trial import Trial


@of_model(batches=16)
def weight_change(trial: Trial, *, steps: int = 16, rate: float = 1e-4) -> dict[str, float]:
    """`||W - W_0||_2 / n` after `steps` steps of Adam on all units together, the rate falling to 0, `n` the number of
    the unit's weights.

    Range: 0 upwards; unit: that of a weight. Cost: `steps` training steps, a copy of the weights, Adam's two numbers
    and a gradient for each.

    Source: AutoLR, Ro and Choi 2021 (arXiv 2002.06048), which measures it over an epoch. Known disagreement: AutoLR
    rolls an epoch back until the changes grow with depth; this is its measure only. Under Adam all weights move at
    about one pace, so the score mostly falls with the size of the unit.

    Example:
        >>> scores = score_blocks(model, dataloader, criterion="weight_change")
    """
    before = {name: [weight.detach().clone() for weight in unit.values()] for name, unit in trial.units.items()}
    with trial.training(*trial.units) as units:
        weights = [weight for unit in units.values() for weight in unit]
        trial.steps(torch.optim.Adam(weights, lr=rate), range(len(trial.batches)), range(steps), rate, steps)
        with torch.no_grad():
            return {
                name: norm([whole(w - start) for w, start in zip(unit, before[name], strict=True)])
                / sum(w.numel() for w in unit)
                for name, unit in units.items()
            }
