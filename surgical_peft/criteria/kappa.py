"""Condition number of the weights, as in KappaTune."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor, nn

from ..blocks.unwrap import named_bare_modules, unwrap_model
from .criterion import of_model
from .short_training.context import ScoringContext
from .weight_snr import matrices_of

LONGEST = 16384  # side of a matrix that is decomposed


@of_model(batches=0)
def kappa(context: ScoringContext) -> dict[str, float]:
    """`1 / kappa` of each weight, the geometric mean over those of the unit: what is best conditioned comes first.

    `kappa = s_max / (s_min + 1e-8)` with the singular values of a matrix. Convolutions count as matrices of output
    channels; in a stack of experts each is a matrix of its own, and the stack has the mean of their `kappa`. Left out
    are vectors, zeros, embedding tables (also one that is the head as well), what has a single row or column or is
    shared by the batch (class tokens, tables of positions), and matrices with a side of more than 16,384. A unit of
    nothing else has no score.

    Range: 0 to 1, no unit. Cost: the singular values of every matrix, once; no data, no gradients.

    Source: KappaTune (arXiv 2506.16289) as in `peft.helpers.KappaTuneSelector` of PEFT 0.21, which tunes the modules
    with the smallest `kappa`; so does this at `granularity="tensor"`. Known disagreement: PEFT takes `nn.Linear` and
    fused experts only, ranks the two apart and knows no blocks. The mean of logarithms over the weights of a block is
    ours: a single one that is nearly singular does not decide alone.

    Example:
        >>> scores = score_blocks(model, None, criterion="kappa")
    """
    modules = named_bare_modules(unwrap_model(context.model))
    tables = {f"{path}.weight" for path, module in modules if isinstance(module, nn.Embedding)}
    logs: dict[str, float] = {}
    for path, matrices in matrices_of(context).items():
        fit = [matrix for matrix in matrices if min(matrix.shape) > 1 and max(matrix.shape) <= LONGEST]
        if fit and path not in tables:
            logs[path] = math.log(statistics.fmean(map(condition_number, fit)))
    of_unit = {
        name: [logs[path] for path, weight in unit.items() if path in logs and weight.shape[0] > 1]
        for name, unit in context.units.items()
    }
    return {name: math.exp(-statistics.fmean(values)) for name, values in of_unit.items() if values}


def condition_number(weight: Tensor) -> float:
    """The largest singular value of a matrix by its smallest one."""
    values = torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    return (values[0] / (values[-1] + 1e-8)).item()
