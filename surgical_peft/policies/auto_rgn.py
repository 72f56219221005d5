"""Auto-RGN: every block at the rate that its relative gradient norm suggests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ..errors import SurgicalError
from ..scoring.block_scores import BlockScores, normalize
from .policy import Policy, TrainingState, Unit, check_cadence, check_count, check_word


def auto_rgn(
    every: str | int = "step",
    granularity: str = "block",
    normalized: str = "max",
    num_batches: int = 5,
    state: str = "keep",
) -> Policy:
    """Learning rates in proportion to the relative gradient norm `||g|| / ||theta||`, scaled to at most 1.

    The head keeps the full rate and stays outside the scaling, and so do units that are all zero: both have large
    ratios that say nothing about the shift. It saves neither memory nor backward time: all blocks have gradients.

    The paper's own settings are [`auto_rgn_paper`][surgical_peft.policies.auto_rgn_paper]. We recommend the defaults
    here: they need no extra pass, and Adam's moments survive.

    Args:
        every: `"step"` reads the gradients at hand before every optimizer step, at no extra pass; `"epoch"` or a
            number of steps scores on `num_batches` training batches at that cadence, and needs `SurgicalCallback`
            among the Trainer's callbacks; where only parts of a block are tuned (`target_modules`), this scores the
            whole block, `"step"` the tuned parts.
        granularity: `"block"`, or `"tensor"` as in the paper's code.
        normalized: `"max"` (divided by the largest, the paper's code) or `"minmax"` (the paper's text: the smallest
            gets rate 0).
        num_batches: how many batches to score on, for all cadences but `"step"`.
        state: `"keep"` the optimizer's state, or `"reset"` it at every probe, as the paper's code does.

    Source: Lee et al. 2022 (arXiv 2210.11466).

    Example:
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=surgical_optimizer(args, policy=policies.auto_rgn()))
    """
    check_cadence("auto_rgn", every, ("step", "epoch"))
    check_word("auto_rgn", "granularity", granularity, ("block", "tensor"))
    check_word("auto_rgn", "normalized", normalized, ("max", "minmax"))
    check_word("auto_rgn", "state", state, ("keep", "reset"))
    check_count("auto_rgn", "num_batches", num_batches, "batches to score on")
    if every == "step":
        if state == "reset":
            raise SurgicalError(
                "state='reset' with every='step' would drop the moments at every step: use every='epoch' or a number "
                "of steps, or state='keep'."
            )
        return AutoRGN(granularity=granularity, normalized=normalized)
    return AutoRGN(
        granularity=granularity,
        normalized=normalized,
        probe_batches=num_batches,
        probe_every=every,
        reset_at_probe=state == "reset",
    )


@dataclass(frozen=True)
class AutoRGN(Policy):
    normalized: str = "max"

    def step_multipliers(self, training: TrainingState) -> dict[str, float] | None:
        if self.probe_batches:
            return None
        values = _ratios(training.units)
        inside = {
            unit.name: value
            for unit, value in zip(training.units, values, strict=True)
            if not (math.isnan(value) or unit.block in training.blocks.heads)
        }
        if not all(map(math.isfinite, inside.values())) or not any(inside.values()):
            return None  # a step that the gradient scaler will skip, or nothing to compare: rates stay as they are
        training.scores.update(
            (unit.name, value) for unit, value in zip(training.units, values, strict=True) if math.isfinite(value)
        )
        return {**{unit.name: 1.0 for unit in training.units}, **normalize(inside, self.normalized)}

    def multipliers_from(self, scores: BlockScores, training: TrainingState) -> dict[str, float] | None:
        inside = {
            unit.name: scores.values[unit.name]
            for unit in training.units
            if unit.name in scores.values and unit.block not in training.blocks.heads
        }
        return {**{unit.name: 1.0 for unit in training.units}, **normalize(inside, self.normalized)}


_PIECE = 2**16  # entries whose float32 norm is exact enough


def _ratios(units: Sequence[Unit]) -> list[float]:
    """`||g|| / ||theta||` of each unit from `parameter.grad`; one transfer to the host however many tensors there are.

    A parameter without a gradient counts as a zero one. A unit whose weights are all zero gives NaN, a gradient that
    is not finite `inf`.
    """
    norms_of = _norms_on_cpu if all(unit.parameters[0].is_cpu for unit in units) else _norms_in_one_call
    with torch.set_grad_enabled(False):  # which the optimizer's step uses anyway; to call `no_grad` too takes longer
        norms = norms_of(units)
    return [_ratio(pull, size) for size, pull in zip(norms[::2], norms[1::2], strict=True)]


def _norms_on_cpu(units: Sequence[Unit]) -> list[float]:
    """For each unit the norm of its weights, then that of its gradients.

    After a backward pass no cache holds this code or its data, and fetching them takes longer than running it. So the
    usual way through is short: a run is copied into one, since a call for each tensor would take longer.
    """
    norms: list[Tensor] = []
    parts: list[int] = []
    alone = torch.get_num_threads() == 1  # then it copies larger runs as fast, and fewer calls are better
    for unit in units:
        weights = [unit.parameters] if alone and unit.size <= _PIECE else unit.runs
        for runs in (weights, [_grads(run) for run in weights]):
            done = len(norms)
            for run in runs:
                if not run:
                    continue
                if run[0].numel() > _PIECE:
                    norms += _foreach_norm(_pieces(run))
                else:
                    flat = _flatten_dense_tensors(run)
                    norms.append(torch.linalg.vector_norm(flat, dtype=torch.promote_types(flat.dtype, torch.float32)))
            parts.append(len(norms) - done)
    numbers = iter(torch.stack(norms).tolist())
    return [math.hypot(*islice(numbers, count)) for count in parts]


def _grads(run: Sequence[Tensor]) -> list[Tensor]:
    return [grad for parameter in run if (grad := parameter.grad) is not None]


def _pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those on the CPU in pieces: there the float32 norm of one with 25 million entries is 0.1 % wrong."""
    return [
        piece
        for each in tensors
        for piece in (each.view(-1).split(_PIECE) if each.is_cpu and each.is_contiguous() else [each])
    ]


def _norms_in_one_call(units: Sequence[Unit]) -> list[float]:
    """The same where each call has to be sent to a device."""
    lists = [_pieces(tensors) for unit in units for tensors in (unit.parameters, _grads(unit.parameters))]
    norms = _foreach_norm([tensor for tensors in lists for tensor in tensors])
    device = norms[0].device
    numbers = iter(torch.stack([norm if norm.device == device else norm.to(device) for norm in norms]).tolist())
    return [math.hypot(*islice(numbers, len(tensors))) for tensors in lists]


def _foreach_norm(tensors: list[Tensor]) -> list[Tensor]:
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))


def _ratio(pull: float, size: float) -> float:
    if size == 0:
        return math.nan
    return pull / size if math.isfinite(pull) else math.inf
