"""BVG-LS: at each step, train only the block whose gradient has the best ratio of bias to variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import SurgicalError
from ..validation import check_choice, check_count, check_number
from .policy import Policy, TrainingState


@dataclass(frozen=True)
class BVGLS(Policy):
    """Train at each step the blocks with the largest ratio of squared mean to variance of their gradient over time.

    With `m` and `s` the exponential moving averages of each entry's gradient and its square, both divided by
    `1 - alpha^t`: `B = sum m^2`, `V = max(sum (s - m^2), 1e-10)`, and the `num_selected` blocks with the largest `B /
    V` have the full rate, the others 0. The ratio is one of sums over a block. As in the paper, the head is a block
    like the others, and the final norm goes with it: alone, its few weights would win nearly always. At the first
    step all variances are 0 and the largest gradient wins; ties go to the earlier block.

    Memory: two float32 numbers for every parameter beyond what the optimizer keeps, and gradients of everything. It is
    soft by nature, since it has to see all gradients, and works under DDP.

    Args:
        alpha: decay of the averages, from 0 to below 1.
        num_selected: how many blocks a step trains.
        momentum: `"accumulate"` as in the released code: the optimizer's moments of blocks that rest go on;
            `"masked"`: they stand still. Decay that the optimizer adds to the gradient (SGD's `weight_decay`) goes
            with them.

    Source: Tomita et al. 2024 (ACCV), from its released code: SGD at 0.01, Nesterov momentum 0.9, weight decay 5e-4.

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy=policies.bvg_ls()))
    """

    alpha: float = 0.9
    num_selected: int = 1
    momentum: str = "accumulate"

    def __post_init__(self) -> None:
        check_number("bvg_ls", "alpha", self.alpha, at_least=0, below=1)
        check_count("bvg_ls", "num_selected", self.num_selected, "blocks a step")
        check_choice("bvg_ls", "momentum", self.momentum, ("accumulate", "masked"))

    @property
    def skip_idle(self) -> bool:
        return self.momentum == "masked"

    def plan(self, training: TrainingState) -> dict[str, float] | None:
        layers = _layers(training)
        if self.num_selected > len(layers):
            raise SurgicalError(
                f"num_selected={self.num_selected} is more than the {len(layers)} blocks that are trained: "
                f"{', '.join(layers)} (a final norm counts with its head)."
            )
        return None

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        parameters = [p for unit in training.units for p in unit.parameters]
        with_grad = [at for at, p in enumerate(parameters) if p.grad is not None]
        grads = [p.grad.float() for p in parameters if p.grad is not None]
        if not grads or not _all_finite(grads):
            return None  # a step that the gradient scaler will skip: it must not enter the averages
        means, squares = _averages(training.state, parameters)
        torch._foreach_mul_([*means, *squares], self.alpha)
        torch._foreach_add_([means[at] for at in with_grad], grads, alpha=1 - self.alpha)
        torch._foreach_addcmul_([squares[at] for at in with_grad], grads, grads, value=1 - self.alpha)
        training.state["count"] = training.state.get("count", 0) + 1

        norms = [*torch._foreach_norm(means, 2), *torch._foreach_norm(squares, 1)]
        numbers = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
        correction = 1 - self.alpha ** training.state["count"]
        parts = iter(zip(numbers[: len(means)], numbers[len(means) :], strict=True))
        biases, totals = {}, {}
        for unit in training.units:
            ours = list(islice(parts, len(unit.parameters)))
            biases[unit.block] = math.fsum((norm / correction) ** 2 for norm, _ in ours)
            totals[unit.block] = math.fsum(total / correction for _, total in ours)
        layers, ratios = _layers(training), {}
        for layer, blocks in layers.items():
            bias = sum(biases[block] for block in blocks)
            # One gradient has no variance; the rounding of the difference would be as large as the threshold.
            variance = sum(totals[block] for block in blocks) - bias if training.state["count"] > 1 else 0.0
            ratios[layer] = bias / max(variance, 1e-10)
            training.scores.update(dict.fromkeys(blocks, ratios[layer]))
        chosen = sorted(ratios, key=ratios.__getitem__, reverse=True)[: self.num_selected]  # a stable sort
        return training.only(block for layer in chosen for block in layers[layer])


def _layers(training: TrainingState) -> dict[str, list[str]]:
    """What is selected as one: each block, but a final norm together with its head."""
    blocks, groups = training.blocks, dict[str, list[str]]()
    heads = {blocks.tower_of(head): head for head in training.heads}
    for name in training.names:
        key = heads.get(blocks.tower_of(name), name) if blocks.kind(name) == "final_norm" else name
        groups.setdefault(key, []).append(name)
    return groups


def _averages(state: dict[str, Any], parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The moving averages, made at the first step, and on the parameters' devices: a checkpoint is read to the CPU."""
    for name in ("means", "squares"):
        if name not in state:
            state[name] = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in parameters]
        state[name] = [average.to(p.device) for average, p in zip(state[name], parameters, strict=True)]
    return state["means"], state["squares"]


def _all_finite(tensors: list[Tensor]) -> bool:
    norms = torch._foreach_norm(tensors, math.inf)
    return bool(torch.stack([norm.float().to(norms[0].device) for norm in norms]).isfinite().all())
