"""Signal-to-noise ratio of the weights themselves, as in Spectrum."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..blocks.unwrap import named_bare_modules, unwrap_model
from .criterion import of_model, whole
from .short_training.context import ScoringContext

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@of_model(batches=0)
def weight_snr(context: ScoringContext) -> dict[str, float]:
    """Rank of each matrix's singular-value ratio among the matrices of its type, averaged over those of the unit.

    `S` the singular values of a matrix, `sigma` their interquartile range / 1.349, `beta` its short by its long side:
    `sum_{S > e} S / sum_{S <= e} S / max S` with `e = sigma (1 + sqrt(beta))`. Ranks, from 1/n to 1, ties shared, run
    over the matrices of one type: the same module in different layers (`layers.*.mlp.fc1.weight`). Convolutions count
    as matrices of output channels, stacks of experts by the mean of theirs. Vectors, zeros and weights alone of their
    type (embeddings, head) have no rank; a unit of nothing else is left out.

    Range: 0 to 1, no unit. Cost: the singular values of every matrix, once; no data, no gradients.

    Source: Spectrum, Hartford et al. 2024 (arXiv 2406.06623), `spectrum.py`. Known disagreement: the threshold is only
    inspired by Marchenko and Pastur (`sigma` of singular values, no factor of the size); the code ranks single
    matrices and always trains embeddings and head.

    Example:
        >>> scores = score_blocks(model, None, criterion="weight_snr")
    """
    ratios: dict[str, dict[str, float]] = {}
    for path, matrices in matrices_of(context).items():
        mean = sum(map(ratio, matrices)) / len(matrices)
        ratios.setdefault(_NUMBER.sub("*", path), {})[path] = mean
    ranks: dict[str, float] = {}
    for group in ratios.values():
        if len(group) > 1:
            for path, value in group.items():
                below = sum(other < value for other in group.values())
                equal = sum(other == value for other in group.values())
                ranks[path] = (below + (equal + 1) / 2) / len(group)
    ranked = {name: [ranks[path] for path in unit if path in ranks] for name, unit in context.units.items()}
    return {name: sum(values) / len(values) for name, values in ranked.items() if values}


def matrices_of(context: ScoringContext) -> dict[str, list[Tensor]]:
    """The matrices, not all zero, of each weight that has any: a stack of experts' weights has one for each."""
    modules = named_bare_modules(unwrap_model(context.model))
    convolutions = {f"{path}.weight" for path, module in modules if isinstance(module, nn.modules.conv._ConvNd)}
    found = {}
    for unit in context.units.values():
        for path, weight in unit.items():
            tensor = whole(weight.detach())
            if tensor.ndim >= 2:
                stacked = tensor.ndim > 2 and path not in convolutions
                matrices = tensor.flatten(0, -3) if stacked else [tensor.flatten(1)]
                if alive := [matrix for matrix in matrices if bool(matrix.any())]:
                    found[path] = alive
    return found


def ratio(weight: Tensor) -> float:
    """Spectrum's ratio of one matrix; infinite if no singular value is below the threshold."""
    matrix = weight.to(torch.promote_types(weight.dtype, torch.float32))
    values = torch.linalg.svdvals(matrix)
    low, high = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device))
    beta = min(matrix.shape) / max(matrix.shape)
    threshold = (high - low) / 1.349 * (1 + beta**0.5)
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return (signal / noise / values.max()).item()
