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
from ..scores import BlockScores, is_head, normalize
from .policy import Policy, Run, Unit, check_cadence, check_count, check_word


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

    def step_multipliers(self, run: Run) -> dict[str, float] | None:
        if self.probe_batches:
            return None
        values = _ratios(run.units)
        inside = {
            unit.name: value
            for unit, value in zip(run.units, values, strict=True)
            if not (math.isnan(value) or is_head(unit.block))
        }
        if not all(map(math.isfinite, inside.values())) or not any(inside.values()):
            return None  # a step that the gradient scaler will skip, or nothing to compare: rates stay as they are
        run.scores.update(
            (unit.name, value) for unit, value in zip(run.units, values, strict=True) if math.isfinite(value)
        )
        return {**{unit.name: 1.0 for unit in run.units}, **normalize(inside, self.normalized)}

    def multipliers_from(self, scores: BlockScores, run: Run) -> dict[str, float] | None:
        inside = {
            unit.name: scores.values[unit.name]
            for unit in run.units
            if unit.name in scores.values and not is_head(unit.block)
        }
        return {**{unit.name: 1.0 for unit in run.units}, **normalize(inside, self.normalized)}


_SMALL = 2**16


def _ratios(units: Sequence[Unit]) -> list[float]:
    """`||g|| / ||theta||` of each unit from `parameter.grad`; one transfer to the host however many tensors there are.

    A parameter without a gradient counts as a zero one. A unit whose weights are all zero gives NaN, a gradient that
    is not finite `inf`.
    """
    with torch.no_grad():
        parts: list[Tensor] = []
        counts: list[int] = []  # of the parts: for each unit those of its weights, then those of its gradients
        for unit in units:
            weights, grads = unit.parameters, [p.grad for p in unit.parameters if p.grad is not None]
            joined = (_pieces(weights, unit.size), _pieces(grads, unit.size))
            counts += map(len, joined)
            parts += [*joined[0], *joined[1]]
        dtype = reduce(torch.promote_types, {part.dtype for part in parts}, torch.float32)
        norms = torch._foreach_norm(parts, 2, dtype=dtype)
        device = parts[0].device
        numbers = iter(torch.stack([norm if norm.device == device else norm.to(device) for norm in norms]).tolist())
    lengths = [math.hypot(*islice(numbers, count)) for count in counts]
    return [_ratio(pull, size) for size, pull in zip(lengths[::2], lengths[1::2], strict=True)]


def _pieces(tensors: Sequence[Tensor], size: int) -> Sequence[Tensor]:
    """The same entries in other tensors, for the CPU: a call for each small one takes longer than to copy them all.

    Large ones there come in pieces: the float32 norm of one with 25 million entries is 0.1 % wrong.
    """
    if not tensors or tensors[0].device.type != "cpu":
        return tensors
    if size <= _SMALL:
        return [_flatten_dense_tensors(tensors)]
    return [piece for each in tensors for piece in (each.view(-1).split(_SMALL) if each.is_contiguous() else [each])]


def _ratio(pull: float, size: float) -> float:
    if size == 0:
        return math.nan
    return pull / size if math.isfinite(pull) else math.inf
