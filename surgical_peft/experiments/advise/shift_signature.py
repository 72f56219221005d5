"""The signature of a shift: how far the features of each block move, and where the gradients lie."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.block_map import BlockMap
from ...scoring.batches import model_loss, to_device
from ...scoring.score import score_blocks

EXAMPLES = 256  # of each of the three groups that are compared, at most
FEWEST = 32  # below, chance moves features as far as many a shift
MOVED = 2.0  # times what two halves of the source differ
HIGH = 1.5  # times the loss on the source
Batches = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Signature:
    """The effect of a shift on a model that knows the source alone.

    Attributes:
        gradients: relative gradient norm of each block on the target.
        loss: on the target.
        source_loss: on the source; None without source data.
        moved: for each block the energy coefficient of its features between source and target, 0 to 1.
        floor: the same between two halves of the source: what is chance.
    """

    gradients: dict[str, float]
    loss: float
    source_loss: float | None = None
    moved: dict[str, float] | None = None
    floor: dict[str, float] | None = None

    @property
    def moving(self) -> tuple[str, ...]:
        """The blocks, in their order, whose features move by more than chance."""
        if self.moved is None or self.floor is None:
            return ()
        return tuple(name for name, value in self.moved.items() if value > MOVED * self.floor[name])

    @property
    def kind(self) -> str | None:
        """The moved part: `input` (from the first block on), `features` (from a later one), `output` or `nothing`.

        None without source data. The output moved if features are as on the source, and the loss is high.
        """
        if self.moved is None or self.source_loss is None:
            return None
        if self.moving:
            return "input" if self.moving[0] == next(iter(self.moved)) else "features"
        return "output" if self.loss > HIGH * self.source_loss else "nothing"


def signature(
    model: nn.Module, target: Batches, source: tuple[Batches, Batches] | None = None, trained: Iterable[Any] = ()
) -> Signature:
    """The signature of a shift; leaves the model as it was.

    Args:
        model: the source model.
        target: batches of the target data, with labels.
        source: two halves of the source data, each with as many examples as `target`.
        trained: batches of the target as training has them, for the gradients; default `target`.

    Raises:
        SurgicalError: as `score_blocks`.

    Source: the energy coefficient of inhomogeneity, Székely and Rizzo 2013, "Energy statistics"; the relative
        gradient norm, Lee et al. 2023 (arXiv 2210.11466).

    Example:
        >>> signature(model, noisy, (clean, more_clean)).kind
        'input'
    """
    blocks = BlockMap.find(model)
    features, loss = _features(model, blocks, target)
    gradients = score_blocks(model, trained or target, "rgn", blocks=blocks).values
    if source is None:
        return Signature(gradients, loss)
    (one, first_loss), (other, second_loss) = (_features(model, blocks, half) for half in source)
    names = [name for name in features if name in one and name in other]
    return Signature(
        gradients,
        loss,
        statistics.fmean((first_loss, second_loss)),
        {name: energy_coefficient(features[name], one[name]) for name in names},
        {name: energy_coefficient(other[name], one[name]) for name in names},
    )


def energy_coefficient(one: Tensor, other: Tensor) -> float:
    """The energy coefficient of two samples: 0 (distributed alike) to 1; the scale of the features does not matter.

    `(2 E|X-Y| - E|X-X'| - E|Y-Y'|) / (2 E|X-Y|)` with Euclidean distances; E is the mean over all pairs, those of a
    point with itself too, so that it is never below 0, and of two small samples of one distribution above it.

    Args:
        one, other: (examples, features).

    Source: Székely and Rizzo 2013, "Energy statistics: a class of statistics based on distances", section 3.

    Example:
        >>> energy_coefficient(torch.zeros(4, 2), torch.ones(4, 2))
        1.0
    """
    one, other = one.double(), other.double()
    between = 2 * torch.cdist(one, other).mean()
    if between == 0:
        return 0.0
    return float((between - torch.cdist(one, one).mean() - torch.cdist(other, other).mean()) / between)


@torch.no_grad()
def _features(model: nn.Module, blocks: BlockMap, batches: Batches) -> tuple[dict[str, Tensor], float]:
    """The output of each block for each example, its tokens or pixels averaged, and the mean loss."""
    features: dict[str, list[Tensor]] = {}
    batch: dict[str, Tensor] = {}
    latest: dict[str, Tensor] = {}

    def reads(name: str) -> Any:
        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            # the mask is of the encoder's tokens
            pooled = _pooled(output, {} if blocks.tower_of(name) == "decoder" else batch, _size(batch))
            if pooled is not None:
                latest[name] = pooled  # of several modules of a block the one that runs last

        return read

    every = dict(model.named_modules())
    hooks = [
        every[path].register_forward_hook(reads(name))
        for name, paths in blocks.modules.items()
        for path in paths
        if path in every
    ]
    modes, losses = [(module, module.training) for module in model.modules()], list[float]()
    sizes = list[int]()
    model.eval()
    try:
        for given in batches:
            batch = to_device(given, model)
            latest.clear()
            losses.append(float(model_loss(model, batch)))
            sizes.append(_size(batch))
            for name, pooled in latest.items():
                features.setdefault(name, []).append(pooled.float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    loss = sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    return {name: torch.cat(parts) for name, parts in features.items() if len(parts) == len(batches)}, loss


def _size(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _pooled(output: Any, batch: Mapping[str, Tensor], size: int) -> Tensor | None:
    """(examples, features) of what a module returned; None if it has not one entry an example."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[0] != size:
        return None
    if output.ndim == 3:  # examples, tokens, features
        mask = batch.get("attention_mask")
        if mask is None or mask.shape != output.shape[:2]:
            return output.mean(1)
        weights = mask.to(output.dtype)[..., None]
        return (output * weights).sum(1) / weights.sum(1).clamp(min=1)
    return output.flatten(2).mean(2) if output.ndim > 3 else output  # examples, channels, pixels
